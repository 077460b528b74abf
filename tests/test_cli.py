"""The command line: help, wrong usage, shell completion, and what `dpgen run` does around a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, make_numbered_rows
from helpers.results import load_all_rows

from dpgen.cli import COMMANDS, build_parser, main
from dpgen.config import options, sections

HEAVY = {"torch", "datasets", "vllm", "transformers", "numpy", "omegaconf", "yaml", "rich", "pyarrow", "shtab"}
# A bare interpreter has about 60; argparse, json, logging and dpgen's own modules make about 150 with it.
MAX_MODULES = 250

COUNT_MODULES = (
    "import sys; from dpgen.cli import main; status = main(sys.argv[1:]); "
    "print(*sys.modules, file=sys.stderr); sys.exit(status)"
)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m dpgen`, without a launcher's variables."""
    return subprocess.run(
        [sys.executable, "-m", "dpgen", *arguments],
        cwd=REPO,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- help


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """The number of modules stands for the time, which a busy machine would blur: 0.1 s on an idle one."""
    done = subprocess.run([sys.executable, "-c", COUNT_MODULES, *arguments], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = set(done.stderr.split())
    assert not modules & HEAVY
    assert len(modules) < MAX_MODULES, sorted(modules)


def test_a_command_imports_no_other_command() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_MODULES, "run", "--help"], capture_output=True, text=True)
    commands = {name for name in done.stderr.split() if name.startswith("dpgen.commands.")}
    assert commands == {"dpgen.commands.run", "dpgen.commands.arguments", "dpgen.commands.arguments.parser"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), (["help"], 0), ([], 2)):
        assert main(arguments) == status
        output = capsys.readouterr().out
        assert all(re.search(rf"^ +{name} +{text[:20]}", output, re.MULTILINE) for name, text in COMMANDS.items())
        assert "exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_wherever_the_option_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["some.yaml", "a=b", "--help"]):
        assert main([name, *arguments]) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"usage: dpgen {name} "), output


def test_help_of_run_has_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    output = capsys.readouterr().out
    for name, default, help in options.legal_keys():
        shown = "required" if default == sections.MISSING else json.dumps(default)
        [entry] = re.findall(rf"^  {re.escape(name)}  \((.*)\)\n((?:      .*\n)+)", output, re.MULTILINE)
        assert entry[0] == shown
        assert " ".join(entry[1].split()) == help


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"dpgen \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# ---- wrong usage


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "dpgen: unknown command rnu, did you mean run? see dpgen --help"),
        (["--versoin"], "dpgen: unknown option --versoin, did you mean --version? see dpgen --help"),
        (["-N", "4"], "dpgen: unknown option -N; see dpgen --help"),
        (["--json", "verify", "x"], "dpgen: unknown option --json; see dpgen --help"),
        (["verify", "x", "--jsn"], "dpgen verify: unknown option --jsn, did you mean --json? see dpgen verify --help"),
        (["verify", "--js", "x"], "dpgen verify: unknown option --js, did you mean --json? see dpgen verify --help"),
        (["verify", "x", "y"], "dpgen verify: unexpected argument 'y'; see dpgen verify --help"),
        (["simulate", "--rank=3"], "unknown option --rank, did you mean --ranks? see dpgen simulate --help"),
        (["simulate", "--rows", "many"], "argument --rows: invalid int value: 'many'; see dpgen simulate --help"),
        (["slurm", "x.yaml", "--submitt"], "--submitt=VALUE, or did you mean --submit? see dpgen slurm --help"),
        (["slurm", "x.yaml", "-N", "4"], "-N: write sbatch's options in their long form, as --nodes for -N"),
        (["run", "x.yaml", "--foo"], "dpgen: error: unknown option --foo; see dpgen run --help"),
        (["run", "--run.dir=x"], "unknown option --run.dir=x, did you mean run.dir=VALUE? see dpgen run --help"),
        (["run", "--foo", "a=b", "x.yaml"], "dpgen: error: unknown option --foo; see dpgen run --help"),
        (["run"], "no configuration; usage: dpgen run CONFIG.yaml"),
        (["--print-completion", "perl"], "--print-completion: invalid choice: 'perl'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_usage_ends_with_status_2_and_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "run":  # it takes the process's signals
        done = run_cli(*arguments)
        status, output, error = done.returncode, done.stdout, done.stderr
    else:
        status = main(arguments)
        output, error = capsys.readouterr()
    assert status == 2, error
    assert line in error and error.count("\n") == 1 and not output, error


def test_files_options_and_keys_stand_in_any_order() -> None:
    parser = build_parser("simulate")[1]["simulate"]
    options, unknown = parser.parse_known_intermixed_args(["a.yaml", "--ranks", "8", "run.seed=-1", "--json", "b.yaml"])
    assert options.configuration == ["a.yaml", "run.seed=-1", "b.yaml"]
    assert options.ranks == "8" and options.json and not unknown


@pytest.mark.parametrize("key", ["run.seed=-1", "data.template=--flag", "data.system_prompt=- a list"])
def test_a_value_may_start_with_a_dash(key: str, write_config: WriteConfig) -> None:
    """The configuration is loaded, and the error, if any, is about the key."""
    options, unknown = build_parser("run")[1]["run"].parse_known_intermixed_args(["conf.yaml", key])
    assert options.configuration == ["conf.yaml", key] and not unknown
    done = run_cli("run", write_config(make_numbered_rows(1)), key, "data.path=nowhere.jsonl")
    assert done.returncode == 2
    assert "unknown option" not in done.stderr and "argument" not in done.stderr


def test_help_is_printed_into_a_pipe_that_is_closed_early() -> None:
    command = f"{sys.executable} -m dpgen run --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.startswith("usage: dpgen run ")
    assert "Exception ignored" not in done.stderr


# ---- shell completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_covers_every_command_and_option(shell: str) -> None:
    done = run_cli("--print-completion", shell)
    assert done.returncode == 0, done.stderr
    for word in (*COMMANDS, "--no-input", "--torchrun", "--ranks"):
        assert word.lstrip("-") in done.stdout
    if shell != "tcsh":
        assert "run.engine=" in done.stdout and "longest_first" in done.stdout
    if shell == "bash" or shutil.which(shell):  # zsh and fish read the script where they are installed
        option = [] if shell == "tcsh" else ["-n"]
        subprocess.run([shell, *option], input=done.stdout, text=True, check=True)


# Completes each line of stdin as bash does: readline splits words at "=", and the cursor is at the end.
COMPLETE = r"""
while IFS= read -r COMP_LINE; do
  COMP_POINT=${#COMP_LINE}
  spaced=${COMP_LINE//=/ = }
  read -ra COMP_WORDS <<< "$spaced"
  [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  COMPREPLY=()
  _dpgen 2>/dev/null
  echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_keys_and_their_values(tmp_path: Path) -> None:
    script = run_cli("--print-completion", "bash").stdout
    (tmp_path / "configs").mkdir()
    (tmp_path / "conf.yaml").write_text("")
    (tmp_path / "complete.sh").write_text(script + COMPLETE)
    expected = {
        "dpgen s": {"status", "slurm", "simulate"},
        "dpgen verify --no": {"--no-input"},
        "dpgen run con": {"conf.yaml", "configs"},
        "dpgen run da": {"data."},
        "dpgen run conf.yaml run.eng": {"run.engine=", "run.engine_timeout_s=", "run.engine_start_timeout_s="},
        "dpgen run conf.yaml mod": {"model="},
        "dpgen run conf.yaml run.engine=": {"vllm", "fake"},
        "dpgen run conf.yaml run.engine=f": {"fake"},
        "dpgen config conf.yaml work.steal=t": {"true"},
        "dpgen slurm conf.yaml run.seed=3 work.order=l": {"longest_first"},
        "dpgen simulate engine.dtype=bf": {"bfloat16"},
        "dpgen run data.path=conf": {"conf.yaml", "configs"},
        "dpgen run no.such.key=conf.": {"conf.yaml"},
        "dpgen export run --format j": {"jsonl"},
        "dpgen verify run.": set(),
    }
    lines = "".join(f"{line}\n" for line in expected)
    command = ["bash", "--norc", "complete.sh"]
    done = subprocess.run(command, input=lines, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [set(line.split()) for line in done.stdout.split("\n")[:-1]]
    assert dict(zip(expected, found, strict=True)) == expected


def test_without_shtab_completion_tells_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError('not here')")
    done = run_cli("--print-completion", "bash", PYTHONPATH=f"{tmp_path}:{REPO}")
    assert done.returncode == 2
    assert done.stderr == "dpgen: --print-completion needs shtab: pip install '.[completion]' in dpgen's checkout\n"


# ---- dpgen run


@pytest.mark.slow
@pytest.mark.multi
def test_with_log_format_json_every_line_of_every_rank_is_one_json_object(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    rows = [*make_numbered_rows(20), {"prompt": None}]
    conf = write_config(rows, run={"log_format": "json", "log_level": "debug"})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], []])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    records = [json.loads(line) for line in jobs[0].output.splitlines()]
    assert all(list(record) == ["time", "level", "rank", "logger", "message"] for record in records)
    assert any(record["message"].startswith("ready after ") for record in records)
    assert any(record["message"].startswith("done: 21 rows, 1 with an error") for record in records)
    assert all(json.loads(line)["rank"] == 1 for line in jobs[1].output.splitlines())


@pytest.mark.slow
@pytest.mark.multi
def test_with_log_format_json_the_error_is_one_record_for_all_ranks(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    conf = write_config(make_numbered_rows(2), run={"log_format": "json"})
    jobs = launcher.start_like_srun("run", conf, "data.prompt_column=promt", rank_arguments=[[], []])
    assert [job.wait() for job in jobs] == [2, 2]
    records = [json.loads(line) for job in jobs for line in job.output.splitlines()]
    [error] = [record for record in records if record["level"] == "ERROR"]
    assert error["rank"] == 0 and "did you mean 'prompt'" in error["message"]
    assert error == records[-1]


@pytest.mark.slow
@pytest.mark.multi
def test_under_torchrun_a_json_error_is_a_record_and_in_torchrun_s_report(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    conf = write_config(make_numbered_rows(2), run={"log_format": "json"})
    job = launcher.dpgen("run", conf, "data.prompt_column=promt", ranks=2)
    assert job.wait() == 1
    lines = job.output.splitlines()
    [record] = [json.loads(line) for line in lines if line.startswith("{")]
    assert record["level"] == "ERROR" and "did you mean 'prompt'" in record["message"]
    assert any("dpgen: error: " in line and "did you mean 'prompt'" in line for line in lines[-5:])


@pytest.mark.slow
@pytest.mark.multi
def test_each_attempt_that_torchrun_restarts_says_once_why_it_ended(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    """torchrun reads the ranks' error files for its last report only."""
    conf = write_config(make_numbered_rows(2))
    job = launcher.dpgen("run", conf, "data.prompt_column=promt", ranks=2, torchrun=["--max-restarts", "1"])
    assert job.wait() == 1
    told = [line for line in job.output.splitlines() if line.startswith("dpgen: error: ")]
    assert len(told) == 1 and "did you mean 'prompt'" in told[0], "the first attempt's, the second is torchrun's report"
    assert any("dpgen: error: " in line and "did you mean 'prompt'" in line for line in job.output.splitlines()[-5:])


@pytest.mark.parametrize("error_file", ["missing/error.json", "full/error.json"])
def test_an_error_that_torchrun_s_file_cannot_take_goes_to_stderr(
    error_file: str, tmp_path: Path, write_config: WriteConfig
) -> None:
    """torchrun ends with a traceback of its own if a file that it has named holds half an error."""
    path = tmp_path / error_file
    conf = write_config(make_numbered_rows(2))
    limited = ""
    if error_file.startswith("full"):
        path.parent.mkdir()
        limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    code = f"{limited}from dpgen.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", conf, "run.sed=3"],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dpgen: error: ") and "did you mean 'run.seed'" in done.stderr
    assert not path.parent.exists() or not list(path.parent.iterdir()), "half an error file is worse than none"


@pytest.mark.multi
def test_a_configuration_error_of_one_rank_is_reported_once_and_ends_all(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Each rank loads its configuration before it joins the others, and keeps an error until then."""
    status = tmp_path / "status"
    jobs = launcher.start_like_srun(
        "run",
        write_config(make_numbered_rows(2)),
        rank_arguments=[[], ["--fast"]],
        DPGEN_STATUS_FILE=str(status),
    )
    assert [job.wait() for job in jobs] == [2, 2], jobs[0].output
    output = "".join(job.output for job in jobs)
    assert output == "dpgen: error: unknown option --fast; see dpgen run --help\n"
    assert status.read_text() == "2 ?\n"


@pytest.mark.parametrize("where", ["file", "command line"])
def test_the_error_of_a_broken_configuration_is_json_only_if_the_command_line_says_so(
    where: str, write_config: WriteConfig
) -> None:
    conf = write_config(make_numbered_rows(2), run={"log_format": "json"})
    done = run_cli("run", conf, "run.sed=3", *(["run.log_format=json"] if where == "command line" else []))
    assert done.returncode == 2
    if where == "command line":
        record = json.loads(done.stderr)
        assert record["level"] == "ERROR" and "did you mean 'run.seed'" in record["message"]
    else:
        assert done.stderr.startswith("dpgen: error: ")


def test_a_wrong_launcher_environment_is_an_error_in_the_chosen_format(write_config: WriteConfig) -> None:
    done = run_cli("run", write_config(make_numbered_rows(2)), "run.log_format=json", RANK="5", WORLD_SIZE="1")
    assert done.returncode == 2
    assert json.loads(done.stderr)["level"] == "ERROR"


def test_an_interruption_is_a_warning_in_json(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(make_numbered_rows(50), engine={"step_s": 0.5}, run={"log_format": "json"})
    job = launcher.dpgen("run", conf)
    while "ready after" not in job.output:
        assert job.process.poll() is None, job.output
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    last = json.loads(job.output.splitlines()[-1])
    assert last["level"] == "WARNING" and "SIGTERM" in last["message"]


BROKEN_RUN = """
import sys
import dpgen.run
from dpgen.__main__ import main

def run(*arguments):
    raise ZeroDivisionError("a fault")

dpgen.run.run = run
main()
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_fault_of_dpgen_s_is_reported_with_its_traceback_and_status_1(
    log_format: str, write_config: WriteConfig
) -> None:
    arguments = ["run", write_config(make_numbered_rows(2)), f"run.log_format={log_format}"]
    done = subprocess.run([sys.executable, "-c", BROKEN_RUN, *arguments], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    message = "ZeroDivisionError: a fault (a fault in dpgen or a library; see above)"
    if log_format == "json":
        first, last = (json.loads(line) for line in done.stderr.splitlines())
        assert "Traceback" in first["message"] and last["message"] == message
        assert (first["level"], last["level"]) == ("ERROR", "ERROR")
    else:
        assert re.search(r"ERROR \[rank 0\] unexpected error\nTraceback ", done.stderr)
        assert done.stderr.endswith(f"\ndpgen: error: {message}\n")


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_a_run_without_stderr_generates_all_rows(closed: str, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(5))
    command = f"exec {sys.executable} -m dpgen run {conf} {closed}"
    assert subprocess.run(command, shell=True, cwd=REPO, check=False).returncode == 0
    load_all_rows(tmp_path / "run", 5)


def test_a_command_without_stdout_does_its_work(write_config: WriteConfig) -> None:
    command = f"exec {sys.executable} -m dpgen preview {write_config(make_numbered_rows(5))} >&-"
    done = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "dpgen", "config", "--schema"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# Python imports this module in every process. Ctrl-C comes when another one is imported.
INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupter:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.{handler})
sys.meta_path.insert(0, Interrupter)
"""


@pytest.mark.parametrize(
    ("command", "module", "status"),
    [
        ("run", "dpgen.cli", 75),
        ("run", "dpgen.rank_process", 75),
        ("run", "dpgen.distributed.rendezvous", 75),
        ("run", "dpgen.run", 75),
        ("run --dry-run", "dpgen.monitoring.preview", -signal.SIGINT),
        ("run-batch", "dpgen.commands.run_batch", 75),
        ("verify", "dpgen.commands.verify", -signal.SIGINT),
        ("verify", "dpgen.output.verification", -signal.SIGINT),
        ("preview", "dpgen.monitoring.preview", -signal.SIGINT),
        ("export conf", "dpgen.output.export.export", -signal.SIGINT),
        ("report", "dpgen.report.writing", -signal.SIGINT),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_a_command_without_a_traceback(
    command: str, module: str, status: int, write_config: WriteConfig, tmp_path: Path
) -> None:
    done = run_with_ctrl_c(tmp_path, [*command.split(), write_config(make_numbered_rows(2))], module)
    assert (done.returncode, done.stdout) == (status, "")
    hint = "dpgen: stopped: interrupted by SIGINT before the run started. Rerun the same command to resume\n"
    assert done.stderr == (hint if module == "dpgen.run" else ""), "a run that has begun says how to resume it"


def test_a_shell_s_loop_ends_with_the_command_that_ctrl_c_ends(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        INTERRUPTED_IMPORT.format(module="dpgen.commands.verify", handler="default_int_handler").replace(
            "os.kill(os.getpid(), ", "os.killpg(0, "
        )
    )
    loop = f"for run in a b; do echo $run; {sys.executable} -m dpgen verify $run; done; echo done"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"}
    done = subprocess.run(
        ["bash", "-c", loop], cwd=REPO, env=env, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "a\n", "")


def test_a_command_whose_shell_ignores_ctrl_c_goes_on(tmp_path: Path) -> None:
    done = run_with_ctrl_c(tmp_path, ["config", "--schema"], "dpgen.cli", handler="SIG_IGN")
    assert done.returncode == 0 and json.loads(done.stdout)


def run_with_ctrl_c(
    tmp_path: Path, arguments: list[str], module: str, handler: str = "default_int_handler"
) -> subprocess.CompletedProcess[str]:
    """Run dpgen, with a Ctrl-C when it imports a module."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(INTERRUPTED_IMPORT.format(module=module, handler=handler))
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'python'}:{REPO}"}
    command = [sys.executable, "-m", "dpgen", *arguments]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
