#!/usr/bin/env bash
# Triton 3.9.0: a kernel that compiles does not run in Triton's own interpreter if a mask combines a comparison of
# scalars with one of blocks. The scalar's truth is spread over the block as numbers of the type that was compared, and
# from 3.9 on loads and stores take masks of booleans only. In 3.7.1 the same kernel ran.
#
# Expected: (at < n) & (row < rows) is a mask, whichever of the two is a scalar.
# Seen: InterpreterError: ValueError('mask has unsupported dtype') in 3.9.0; the right values in 3.7.1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/kernel.py" <<'CODE'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def copy(x, out, n, rows, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask = (at < n) & (row < rows)
    tl.store(out + row * n + at, tl.load(x + row * n + at, mask=mask, other=0), mask=mask)


x, out = torch.arange(12.0).view(3, 4), torch.zeros(3, 4)
try:
    copy[(3,)](x, out, 4, 2, BLOCK=8)
    found = "right" if torch.equal(out, torch.cat([x[:2], torch.zeros(1, 4)])) else "wrong"
except Exception as error:
    found = str(error)
print(f"triton {triton.__version__}, interpreted: {found}")
assert sys.argv[1] in found, "changed"
CODE
for version in 3.7.1:right "3.9.0:mask has unsupported dtype"; do
    "$folder/venv/bin/pip" install -q --no-deps "triton==${version%%:*}"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernel.py" "${version#*:}" 2> >(grep -v nanobind >&2)
done
