"""Mixtures of experts in a graph: two products with routed stacks, what stands between them, before and after."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from itertools import product as combinations

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.passes.find.products import Product
from marlin_w4a16.passes.graph.constants import Constants, needed_by
from marlin_w4a16.passes.graph.flow import Flow
from marlin_w4a16.passes.graph.names import module_path
from marlin_w4a16.passes.graph.nodes import example, is_reshaped, layout, sizes, storage
from marlin_w4a16.passes.graph.torch_private import source_name
from marlin_w4a16.passes.mixture.ids import are_distinct, are_ranks
from marlin_w4a16.passes.outcome import Rejected

_ID_DTYPES = (torch.int64, torch.int32)
_MOST = 4  # candidates of each kind
_OUTPUTS = 8  # with one expert a token, all that is made of the second product has the shape of the sum
_CANDIDATES = 8
_FARTHEST = 64  # nodes between the second product and the sum


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A part of a flat graph that may be a mixture of experts; nothing of it is proved.

    Attributes:
        first, second: its products.
        x: the tokens ``[t, hidden]``.
        ids: the experts of each token ``[t, k]``.
        weights: their routing weights ``[t, k]``.
        scores: where they are spread over all experts ``[t, experts]``, to be read at the ids; else None.
        on_input: they multiply the input of the experts.
        output: the sum ``[t, hidden]``.
        nodes: what computes the output from tokens, ids and weights, in graph order.
        known: the constants of the graph.
        bias13, bias2: those ``[experts, rows]`` that are added to the products, or None.
        ranked: the ids are places among the scores of a router: there are none of no expert.
    """

    first: Product
    second: Product
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    scores: fx.Node | None
    on_input: bool
    output: fx.Node
    nodes: list[fx.Node]
    known: Constants
    bias13: fx.Node | None = None
    bias2: fx.Node | None = None
    ranked: bool = False

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.first.matrices.batch

    @property
    def chosen(self) -> int:
        """How many of them each token has."""
        return sizes(self.ids)[1]

    @property
    def given(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """What it is computed from."""
        return self.x, self.ids, self.weights

    @property
    def trained(self) -> bool:
        """Whether gradients of its tokens, routing weights or biases are asked for."""
        return any(getattr(example(node), "requires_grad", False) for node in (*self.given, *self.constants))

    @property
    def constants(self) -> list[fx.Node]:
        """What else enters it, the stacks left out."""
        return [node for node in self._entering if node not in self.shapes]

    @property
    def shapes(self) -> list[fx.Node]:
        """What enters it by its shape alone."""
        return [node for node in self._entering if node not in self.known]

    @property
    def _entering(self) -> list[fx.Node]:
        inside = {*self.nodes, *self.given, self.first.weight_node, self.second.weight_node}
        used = (n for node in self.nodes if node not in self.gathers for n in node.all_input_nodes)
        return [node for node in dict.fromkeys(used) if node not in inside]

    @property
    def gathers(self) -> list[fx.Node]:
        """What gathers matrices for the products."""
        routes = [product.route for product in (self.first, self.second) if product.route is not None]
        return [route.reader for route in routes if route.by == "ids"]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes of the tensor that is the sum."""
        like = layout(self.output)
        same = [n for n in self.nodes if storage(n) == storage(self.output) is not None and layout(n) == like]
        return [n for n in same if n is self.output or any(user not in self.nodes for user in n.users)] or [self.output]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two routed products, the second of what the first gives, and what they may be a mixture of."""

    first: Product
    second: Product
    candidates: list[Candidate] | Rejected


def find_pairs(products: Sequence[Product], flow: Flow) -> list[Pair]:
    """The pairs of routed products of as many experts, each product in one of them, in the order of the graph."""
    routed = {product.node: product for product in products if product.routed and product.refusal is None}
    found, doubtful = [], []
    taken: set[fx.Node] = set()
    for second in routed.values():
        nearest = max((node for node in flow.before([second.x_node]) if node in routed), default=None)
        if nearest is None or nearest in taken:
            continue
        first = routed[nearest]
        i, rows = second.matrices.k, first.matrices.n
        if first.matrices.batch == second.matrices.batch and rows in (i, 2 * i):
            pair = Pair(first, second, _ClosedParts(first, second, flow).run())
            if isinstance(pair.candidates, Rejected):
                doubtful.append(pair)
            else:
                found.append(pair)
                taken |= {first.node, second.node}
    for pair in doubtful:
        nodes = {pair.first.node, pair.second.node}
        if taken.isdisjoint(nodes):
            taken |= nodes
            found.append(pair)
    return found


class _ClosedParts:
    """The search for closed parts of a graph that hold two products."""

    def __init__(self, first: Product, second: Product, flow: Flow) -> None:
        self.first, self.second, self.flow = first, second, flow
        self.why = "the tokens, their experts or the routing weights were not found"

    def run(self) -> list[Candidate] | Rejected:
        """The candidates, the likeliest first."""
        if any(len(p.equation.rows) != 1 or len(p.equation.columns) != 1 for p in (self.first, self.second)):
            return Rejected("no whole mixture: its products have several axes of rows or columns")
        return list(islice(self._found(), _CANDIDATES)) or Rejected(f"no whole mixture: {self.why}")

    def _found(self) -> Iterator[Candidate]:
        for ids in self._near(self._routing(), _ID_DTYPES):
            t, k = sizes(ids)
            for output in self._outputs(t):
                tokens = self._near([self.first.x_node], DTYPES, (t, self.first.matrices.k))
                weights = self._near([output], DTYPES, (t, k))
                closed = (self._closed(x, ids, weight, output) for x, weight in combinations(tokens, weights))
                yield from (mixture for mixture in closed if mixture is not None)

    def _routing(self) -> list[fx.Node]:
        """Where to look for ids: at the route; where every token goes to all experts, at tokens and at what is made."""
        if self.first.route is not None:
            return [self.first.route.node]
        return [self.first.x_node, max(self._made())]

    def _made(self) -> set[fx.Node]:
        return self.flow.after(self.second.node, self.flow.following(self.second.node, _FARTHEST))

    def _near(
        self, roots: list[fx.Node], dtypes: Sequence[torch.dtype], shape: tuple[int, int] | None = None
    ) -> list[fx.Node]:
        """The nearest matrices of some dtypes, and of a shape, from which nodes are computed."""
        return [node for node in self.flow.before(roots) if _is_matrix(node, dtypes, shape)][:_MOST]

    def _outputs(self, tokens: int) -> list[fx.Node]:
        """Where the sum may be: what is computed from the second product and has its shape, the last first."""
        found = [node for node in sorted(self._made()) if _is_matrix(node, DTYPES, (tokens, self.second.matrices.n))]
        return found[:_OUTPUTS][::-1]

    def _closed(self, x: fx.Node, ids: fx.Node, weights: fx.Node, output: fx.Node) -> Candidate | None:
        given, constants = {x, ids, weights}, self.flow.constants
        nodes = self.flow.part(output, given) if output not in given else None
        if nodes is None or not {self.first.node, self.second.node} <= set(nodes):
            return None
        if not given <= {used for node in nodes for used in node.all_input_nodes}:
            return None
        made = self.flow.after(self.first.node, nodes)
        fed = set(self.flow.before(self.flow.reads(self.second.node), given))
        entry = self.flow.before([self.first.x_node], {x, ids, weights})
        on_input = any(weights in self.flow.reads(node) for node in entry)
        spread = sizes(x)[0], self.first.matrices.batch
        scores = [node for node in nodes if node not in made and _is_matrix(node, DTYPES, spread)]
        last = scores[-1] if scores and are_distinct(ids, self.flow) else None
        mixture = Candidate(
            self.first, self.second, x, ids, weights, last, on_input, output, nodes, constants,
            ranked=are_ranks(ids, self.first.matrices.batch, self.flow),
        )  # fmt: skip
        if self.flow.is_written(given, nodes[0], output) or (last and self.flow.is_written([last], last, output)):
            self.why = "what it reads is written to on the way"
            return None
        if any(map(is_reshaped, (*nodes, *given))):
            self.why = "something on the way gets another shape in place"
            return None
        if len({repr(node.meta.get("autocast")) for node in (self.first.node, self.second.node, output)}) > 1:
            self.why = "its sum stands in another autocast than its products"
            return None
        if mixture.trained and self.flow.sets_gradients(nodes[0], output):
            self.why = "gradients are switched on or off on the way"
            return None
        outputs = mixture.outputs
        for node in {*made, *(node for node in nodes if storage(node) == storage(output) is not None)}:
            outside = [user for user in node.users if user not in nodes]
            if outside and (node not in outputs or min(outside) < output):
                self.why = f"{node.name}, which it makes on the way, is used elsewhere"
                return None
        return self._with_biases(mixture, fed)

    def _with_biases(self, mixture: Candidate, fed: set[fx.Node]) -> Candidate | None:
        """The mixture with its biases, if all weights that enter it are such."""
        found: dict[str, fx.Node] = {}
        constants = self.flow.constants
        for node in mixture.constants:
            if constants.leaves.isdisjoint(needed_by([node], constants)):
                continue
            which, product = ("bias13", self.first) if fed & node.users.keys() else ("bias2", self.second)
            shape = mixture.experts, product.matrices.n
            if which in found or not _is_matrix(node, DTYPES, shape):
                path = module_path(source_name(node)) if node in constants.leaves else node.name
                self.why = f"{path} enters it, which is no bias of shape {list(shape)}"
                return None
            found[which] = node
        return dataclasses.replace(mixture, bias13=found.get("bias13"), bias2=found.get("bias2"))


def _is_matrix(node: fx.Node, dtypes: Sequence[torch.dtype], shape: tuple[int, int] | None) -> bool:
    """Whether a node is a matrix of some dtypes, and of a shape."""
    value = example(node)
    fits = isinstance(value, Tensor) and value.ndim == 2 and value.dtype in dtypes
    return fits and (shape is None or sizes(node) == shape)
