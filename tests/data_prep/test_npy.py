import gc
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import INDEX_DTYPE
from data_prep.npy import map_npy, parse_npy

rng = np.random.default_rng(0)
ROWS = np.array([(512 * i, i, -i, b"key%d" % i) for i in range(50)], INDEX_DTYPE)
ARRAYS = {
    "index": ROWS,
    "one row": ROWS[:1],
    "no row": ROWS[:0],
    "label map": rng.normal(size=(2, 5, 3, 4)).astype("<f2"),
    "single floats": rng.normal(size=(2, 5, 18, 18)).astype("<f4"),
    "a number": np.array(3.5),
    "bytes": np.frombuffer(b"abc", "u1"),
}


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_writes(name: str, tmp_path: Path) -> None:
    path, array = tmp_path / "a.npy", ARRAYS[name]
    path.write_bytes(saved(array) + b"and more")
    for found in (map_npy(path), parse_npy(path.read_bytes())):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array, strict=True)
    assert parse_npy(path.read_bytes()).flags.writeable
    assert not array.size or not map_npy(path).flags.writeable


def header(text: str, data: bytes = bytes(800)) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not an .npy file"),
    "an archive": (b"PK\x03\x04" + bytes(100), "not an .npy file"),
    "another version": (saved(ROWS).replace(b"NUMPY\x01", b"NUMPY\x02"), "not an .npy file of version 1.0"),
    "cut in the header": (saved(ROWS)[:90], "header"),
    "cut in the data": (saved(ROWS)[:-1], "too few for shape"),
    "columns first": (saved(np.asfortranarray(rng.normal(size=(3, 4)))), "header"),
    "objects": (header("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n"), "Python objects"),
    "a field of objects": (header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (2,), }\n"), "objects"),
    "no type": (header("{'descr': 'x9', 'fortran_order': False, 'shape': (2,), }\n"), "names no type"),
    "a type like code": (header("{'descr': 'f4,,', 'fortran_order': False, 'shape': (2,), }\n"), "names no type"),
    "code": (header("{'descr': exit(), 'fortran_order': False, 'shape': (2,), }\n"), "names no type"),
    "code in a field": (header("{'descr': [('a', exit())], 'fortran_order': False, 'shape': (2,), }\n"), "no type"),
    "more than there is": (header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**30},), }}\n"), "too few"),
    "less than nothing": (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-2,), }\n"), "header"),
    "brackets": (header("(" * 5000), "header"),
    "long": (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }" + " " * 20_000 + "\n"), "header"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_does_not(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        map_npy(path)
    if name != "long":  # bytes in memory have no limit
        with pytest.raises(ValueError, match=said):
            parse_npy(data)


@pytest.mark.filterwarnings("ignore:Data type alias")
def test_any_bit_flipped(tmp_path: Path) -> None:
    data = saved(ROWS[:2])
    path = tmp_path / "a.npy"
    for bit in range(0, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        for read in (lambda: map_npy(path), lambda data=bytes(damaged): parse_npy(data)):
            with suppress(ValueError):
                assert read().nbytes <= len(data)


@pytest.fixture
def busy_collector() -> Iterator[None]:
    """Garbage is collected at nearly every allocation, and another thread goes on meanwhile."""
    before = gc.get_threshold(), sys.getswitchinterval()

    def work(phase: str, info: dict[str, int]) -> None:
        for _ in range(20):
            pass

    gc.callbacks.append(work)
    sys.setswitchinterval(1e-6)
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before[0])
    sys.setswitchinterval(before[1])
    gc.callbacks.remove(work)


@pytest.mark.usefixtures("busy_collector")
@pytest.mark.parametrize("read", [map_npy, lambda path: parse_npy(path.read_bytes())], ids=["map", "parse"])
def test_threads(read: Callable[[Path], np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(saved(ROWS))
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(read, [path] * 2000):
            assert found.tobytes() == ROWS.tobytes()
