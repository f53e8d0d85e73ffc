"""Tensors of files, one or many at once: bit for bit what safetensors reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from marlin_w4a16.checkpoints import files, reader
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.reader import Place, Reader

CPU = torch.device("cpu")
MANY = {f"{i}.weight": torch.randint(256, (7, 13), dtype=torch.uint8) for i in range(9)}


@pytest.fixture
def entries(tmp_path) -> dict[str, files.Entry]:
    """Nine tensors in two files, and a stack that goes on in no other."""
    names = list(MANY)
    save_file({name: MANY[name] for name in names[:4]}, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(
        {name: MANY[name] for name in names[4:]} | {"stack": torch.stack(list(MANY.values()))},
        tmp_path / "b.safetensors",
    )
    return files.entries(sorted(tmp_path.glob("*.safetensors")))


def test_a_reader_opens_each_file_once(entries, monkeypatch):
    opened, path_open = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args: opened.append(path.name) or path_open(path, *args))
    with Reader(CPU) as found:
        for name in 2 * list(MANY):
            assert torch.equal(found.tensor(entries[name], name), MANY[name])
            assert torch.equal(found.tensor(entries["stack"], "stack", int(name[0])), MANY[name])
    assert opened == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("dtype", reader._DTYPES.values(), ids=reader._DTYPES)
def test_every_dtype_with_and_without_axes(dtype, tmp_path):
    bits = torch.randint(2 if dtype == torch.bool else 256, (3, 4, dtype.itemsize), dtype=torch.uint8)
    tensors = {"stack": bits.view(dtype)[..., 0], "one": bits.view(dtype)[1, 1, 0], "none": bits.view(dtype)[:0, :, 0]}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    entries = files.entries([tmp_path / "a.safetensors"])
    with Reader(CPU) as found:
        for name, tensor in tensors.items():
            read = found.tensor(entries[name], name)
            assert (read.dtype, read.shape) == (dtype, tensor.shape)
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).contiguous().view(torch.uint8))


@pytest.mark.parametrize("threads, piece", [(1, 1 << 20), (3, 10), (4, 1 << 20), (16, 91)])
def test_many_are_read_into_one_by_any_number_of_threads(threads, piece, entries, monkeypatch):
    monkeypatch.setattr(reader, "_THREADS", threads)
    monkeypatch.setattr(reader, "_PIECE", piece)
    monkeypatch.setattr(reader, "_ALONE", 0)
    order = [8, 0, 3, 3, 5, 4]
    expected = torch.stack([MANY[f"{i}.weight"] for i in order])
    with Reader(CPU) as found:
        places = [Place(entries[f"{i}.weight"], f"{i}.weight") for i in order]
        assert torch.equal(found.stacked(places), expected)
        assert torch.equal(found.stacked([Place(entries["stack"], "stack", i) for i in order], CPU), expected)


def test_a_file_that_is_another_one_by_now(entries):
    save_file({"1.weight": MANY["1.weight"][:, :6].clone()}, entries["1.weight"].file)
    with Reader(CPU) as found:
        for name in ("0.weight", "1.weight"):
            with pytest.raises(CheckpointError, match=rf"a\.safetensors: {name}: found another file .* U8 \[7, 13\]"):
                found.tensor(entries[name], name)


def test_a_file_that_ends_while_it_is_read(entries):
    file = entries["3.weight"].file
    with Reader(CPU) as found:
        found.tensor(entries["0.weight"], "0.weight")
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"found the end of a file at byte \d+, expected 1 more"):
            [found.tensor(entries[name], name) for name in list(MANY)[:4]]
