"""The command flash-dmattn."""

import re

import pytest

from flash_dmattn import __version__, cli, get_available_backends

TINY = ["--batch", "1", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--repeats", "1", "--device", "cpu"]


def test_info_tells_what_is_there(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"flash_dmattn {__version__}" in out
    listed = dict(re.findall(r"^  (cuda|triton|flex|cpu) +(.*)$", out.split("devices:")[0], re.MULTILINE))
    assert [name for name, state in listed.items() if state == "available"] == get_available_backends()
    assert re.search(r"cpu +compiled in; this machine runs those for \w+", out)


def test_bench_times_every_length_and_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "times.png"
    assert cli.main(["bench", "--lengths", "32", "48", "--window", "16", "--plot", str(plot), *TINY]) == 0
    rows = re.findall(r"^ +(\d+)((?: +[\d.]+ / +[\d.]+){3}) +([\d.]+)x$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["32", "48"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bench_in_half_precision(capsys, dtype):
    assert cli.main(["bench", "--lengths", "32", "--window", "16", "--dtype", dtype, *TINY]) == 0
    assert dtype in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["bench", "--window", "0"], "--window: must be positive, got 0"),
        (["bench", "--dtype", "int8"], "--dtype: invalid choice"),
        (["precompile"], "required: --arch"),
        (["precompile", "--arch", "sm_80", "--head-dim", "12"], "--head-dim: must be a multiple of 8 from 8 to 256"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_heads_that_fit_no_groups_are_named(capsys):
    assert cli.main(["bench", "--heads", "3", "--kv-heads", "2"]) == 2
    assert "--heads must be a multiple of --kv-heads, got 3 and 2" in capsys.readouterr().err
