"""The CUDA kernels from source to disk. No GPU is needed, but NVRTC is."""

import multiprocessing
import os
import resource
import subprocess
import sys
import warnings

import pytest

from flash_dmattn import cli, cuda_kernels
from flash_dmattn.cuda_kernels import Kernel, Resources


def no_compiler():
    try:
        cuda_kernels.compiler()
    except RuntimeError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    monkeypatch.setenv("FLASH_DMATTN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def small():
    return cuda_kernels.kernels(["sm_80"], ["bfloat16"], [64])[0]


@pytest.fixture(scope="module")
def fork():
    """Starts functions in new processes, which share the time that imports take."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flash_dmattn", __name__])
    return context


def compile_in(folder, kernel, barrier, results):
    os.environ["FLASH_DMATTN_CACHE_DIR"] = str(folder)
    barrier.wait()
    results.put(cuda_kernels.compile(kernel))


@needs_compiler
def test_16_processes_fill_one_folder_at_once(folder, small, fork):
    barrier, results = fork.Barrier(16), fork.Queue()
    processes = [fork.Process(target=compile_in, args=(folder, small, barrier, results)) for _ in range(16)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=600) for _ in processes}) == 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [file.suffix for file in folder.iterdir()] == [".kernel"]


@needs_compiler
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-9] + b"damaged.\n", bytes])
def test_damaged_file_is_replaced(folder, small, damage):
    first = cuda_kernels.compile(small)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content if damage is not bytes else b""))
    assert cuda_kernels.compile(small) == first
    assert list(folder.iterdir()) == [file]
    assert len(file.read_bytes()) == len(content)


def compile_twice_without_room(folder, kernel, bytes_per_file, results):
    os.environ["FLASH_DMATTN_CACHE_DIR"] = str(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if bytes_per_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, limits[1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = [cuda_kernels.compile(kernel) for _ in range(2)]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    results.put((compiled, [(warning.category, str(warning.message)) for warning in caught]))


@needs_compiler
@pytest.mark.parametrize("trouble", ["read-only", "full"])
def test_folder_that_takes_nothing_costs_one_warning(tmp_path, small, fork, trouble):
    # What no permissions stop, as root is not stopped by any: a folder below a file.
    below_file = tmp_path / "file"
    below_file.touch()
    folder = below_file / "kernels" if trouble == "read-only" else tmp_path
    results = fork.Queue()
    process = fork.Process(
        target=compile_twice_without_room, args=(folder, small, 4096 if trouble == "full" else None, results)
    )
    process.start()
    compiled, [(category, text)] = results.get(timeout=600)
    process.join()
    assert compiled[0] == compiled[1] and compiled[0].registers > 0
    assert category is RuntimeWarning
    reason = {"read-only": f"cannot make the folder {folder}", "full": f"cannot write to the folder {folder}"}[trouble]
    assert reason in text and "FLASH_DMATTN_CACHE_DIR" in text
    assert list(tmp_path.iterdir()) == [below_file]


@needs_compiler
def test_compiler_errors_are_shown(folder, small):
    with pytest.raises(RuntimeError, match="NoSuchKernel"):
        cuda_kernels.compile(Kernel("sm_80", small.header, "NoSuchKernel"))
    with pytest.raises(RuntimeError, match=r"sm_75; NVRTC .* can for sm_80"):
        cuda_kernels.compile(Kernel("sm_75", small.header, small.name))


def test_everything_is_listed_once():
    listed = cuda_kernels.kernels()
    assert len(set(listed)) == len(listed)
    assert {kernel.arch for kernel in listed} == set(cuda_kernels.ARCHS)
    few = cuda_kernels.kernels(covering=True)
    assert set(few) < set(listed)
    assert few == cuda_kernels.kernels(covering=True)


@needs_compiler
def test_precompile_fills_the_folder(folder, capsys, monkeypatch):
    chosen = cuda_kernels.kernels(["sm_80", "sm_90a"], ["bfloat16"], [64])[:2]
    asked = []
    monkeypatch.setattr(cuda_kernels, "kernels", lambda *arguments: asked.append(arguments) or chosen)
    monkeypatch.setattr(cuda_kernels, "LOCAL_BYTES", {kernel.name.partition("<")[0]: 1 << 20 for kernel in chosen})
    arguments = ["--arch", "sm_80", "--arch", "sm_90a", "--dtype", "bfloat16", "--head-dim", "64", "--jobs", "2"]
    assert cli.main(["precompile", *arguments]) == 0
    assert asked == [(["sm_80", "sm_90a"], ["bfloat16"], [64], False)]
    assert len(list(folder.iterdir())) == len(chosen)
    out = capsys.readouterr().out
    assert f"{len(chosen)} kernels in " in out and str(folder) in out and "most registers: " in out
    cli.main(["info"])
    assert f"cache:    {folder}\n          {len(chosen)} CUDA kernels, 0." in capsys.readouterr().out


@needs_compiler
def test_precompile_fails_on_local_memory_that_nobody_knows(small, capsys, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "kernels", lambda *arguments: [small])
    monkeypatch.setattr(cuda_kernels, "compile", lambda kernel: Resources(registers=255, local_bytes=24))
    monkeypatch.setattr(cuda_kernels, "LOCAL_BYTES", {})
    assert cli.main(["precompile", "--arch", "sm_80"]) == 1
    captured = capsys.readouterr()
    assert f"local memory: 24 bytes of 0 allowed, {small.name} for sm_80" in captured.out
    assert "1 kernels take too much local memory" in captured.err
    monkeypatch.setattr(cuda_kernels, "LOCAL_BYTES", {small.name.partition("<")[0]: 24})
    assert cli.main(["precompile", "--arch", "sm_80"]) == 0


@needs_compiler
def test_precompile_refuses_what_is_no_arch(capsys):
    assert cli.main(["precompile", "--arch", "hopper"]) == 2
    assert 'arch: is "hopper", takes sm_80' in capsys.readouterr().err


def test_info_says_what_is_missing(capsys, monkeypatch):
    def compiler():
        raise RuntimeError("NVRTC is missing")

    monkeypatch.setattr(cuda_kernels, "compiler", compiler)
    for variable in ("FLASH_DMATTN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "cuda    cannot be compiled: NVRTC is missing" in out
    assert "cache:    none: neither FLASH_DMATTN_CACHE_DIR nor HOME is set\n          0 CUDA kernels" in out
    assert cli.main(["precompile", "--arch", "sm_80"]) == 2
    assert "NVRTC is missing" in capsys.readouterr().err


def test_info_without_gpu():
    command = [sys.executable, "-m", "flash_dmattn.cli", "info"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in out.splitlines() if line.startswith("  cuda    missing: ")]
    assert any(reason in line for reason in ("driver is missing", "no CUDA-capable device", "built without CUDA"))
