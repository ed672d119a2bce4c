"""``gradwatch run``: the command does not notice, and its gradients are at the server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.spool import Spool
from gradwatch.launch.command import _deliver_spools
from gradwatch.settings import resolve
from tests.processes import free_port

from .conftest import Server

SCRIPT = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
print("out", file=sys.stdout)
print("err", file=sys.stderr)
"""


def launch(server: Server, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from gradwatch.cli import main; sys.exit(main())",
            "run",
            "--url",
            server.url,
            "--every",
            "1",
            "--",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **environment},
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_a_script_is_watched_under_its_name(server: Server, script: Path) -> None:
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
    assert server.registrations[0].name.startswith("train ")
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("completed", 0)


def test_the_exit_code_is_the_commands_and_ends_the_run(server: Server, script: Path) -> None:
    script.write_text(f"{SCRIPT}\nsys.exit(7)", encoding="utf-8")
    assert launch(server, sys.executable, str(script)).returncode == 7
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("failed", 7)
    assert len(server.samples) == 5


COUNTED = """
from gradwatch.delivery.spool import Spool
append, kept = Spool.append, []
def counted(self, kind, body, samples=0):
    append(self, kind, body, samples)
    kept.append(samples)
Spool.append = counted
"""
KILLED = """
import os, time
deadline = time.monotonic() + 60
while sum(kept) < 5 and time.monotonic() < deadline: time.sleep(0.05)
os.kill(os.getpid(), 15)
"""


def test_a_signal_kills_as_ever_and_nothing_is_lost(server: Server, script: Path) -> None:
    script.write_text(COUNTED + SCRIPT + KILLED, encoding="utf-8")
    assert launch(server, sys.executable, str(script)).returncode == -signal.SIGTERM
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("killed", -signal.SIGTERM)
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


def test_signals_and_standard_input_reach_the_command(server: Server, script: Path) -> None:
    """It answers a signal in its own way, and its answer is the launcher's."""
    script.write_text(
        SCRIPT + "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(sys.stdin.readline() != 'in\\n' and 4 or 5))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.05)",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "gradwatch", "run", "--url", server.url, "--every", "1", "--", sys.executable]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, str(script)], text=True, **pipes) as running:  # type: ignore[call-overload]
        assert [running.stdout.readline() for _ in range(2)] == ["out\n", "ready\n"]
        running.send_signal(signal.SIGTERM)
        assert running.communicate("in\n", timeout=300) == ("", "err\n")
    assert running.returncode == 5
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("failed", 5)


INTERRUPTED = """
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda *_: (seen.append(1), print("interrupted", flush=True)))
signal.signal(signal.SIGQUIT, lambda *_: (seen.append(1), print("quit", flush=True)))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(len(seen)))
print("ready", flush=True)
while True: time.sleep(0.05)
"""
IN_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_signals_of_a_supervisor_reach_the_command() -> None:
    command = [sys.executable, "-m", "gradwatch", "run", "--", sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True) as running:
        assert running.stdout is not None
        said = [running.stdout.readline()]
        for number in (signal.SIGINT, signal.SIGQUIT):
            running.send_signal(number)
            said.append(running.stdout.readline())
        running.terminate()
    assert said == ["ready\n", "interrupted\n", "quit\n"]
    assert running.returncode == 2


@pytest.mark.parametrize(("key", "answer"), [(b"\x03", "interrupted\n"), (b"\x1c", "quit\n")])
def test_a_key_reaches_the_command_once(key: bytes, answer: str) -> None:
    ours, terminal = os.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, "-m", "gradwatch", "run", "--", sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, text=True, stdin=terminal, stdout=subprocess.PIPE) as running:
        os.close(terminal)
        assert running.stdout is not None
        said = [running.stdout.readline()]
        os.write(ours, key)
        said.append(running.stdout.readline())
        running.terminate()
    os.close(ours)
    assert said == ["ready\n", answer]
    assert running.returncode == 1


@pytest.mark.parametrize("trains", [False, True])
def test_who_sits_at_a_terminal_is_told_where_nothing_was_watched(server: Server, script: Path, trains: bool) -> None:
    ours, terminal = os.openpty()
    run = ["run", "--url", server.url, "--", sys.executable, *([] if trains else ["-I"]), str(script)]
    done = subprocess.run([sys.executable, "-m", "gradwatch", *run], stderr=terminal, check=False, timeout=600)
    os.close(terminal)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert ("nothing was watched" in said) != trains
    assert bool(server.registrations) == trains


def test_a_child_of_the_command_is_watched(server: Server, script: Path) -> None:
    done = launch(server, "sh", "-c", f"{sys.executable} {script}; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


def test_a_module_and_the_users_own_sitecustomize(server: Server, script: Path, tmp_path: Path) -> None:
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__main__.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        "import os; 'GRADWATCH_LAUNCH' in os.environ and print('mine')", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = launch(server, sys.executable, "-m", "trainer", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\nout\n"
    assert server.registrations[0].name.startswith("trainer ")
    assert len(server.samples) == 5


def test_torch_is_not_imported_for_those_who_do_not(server: Server) -> None:
    done = launch(server, sys.executable, "-c", "import sys; print('torch' in sys.modules, 'gradwatch' in sys.modules)")
    assert done.stdout == "False False\n"
    assert not server.requests


def test_a_command_that_does_not_exist(server: Server) -> None:
    done = launch(server, "no-such-command")
    assert done.returncode == 127
    assert "no-such-command" in done.stderr


def test_torchrun(server: Server, script: Path) -> None:
    done = launch(
        server, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)
    )
    assert done.returncode == 0, done.stderr
    assert len({registration.id for registration in server.registrations}) == 1
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
distributed.destroy_process_group()
"""


def test_a_model_that_is_sharded_at_its_root_alone(server: Server, tmp_path: Path) -> None:
    """In its backward pass its parameters are unsharded; at its end the process group is gone before the run ends."""
    script = tmp_path / "train.py"
    script.write_text(SHARDED, encoding="utf-8")
    done = launch(
        server, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)
    )
    assert done.returncode == 0, done.stderr
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    assert [batch.end.status for batch in server.batches if batch.end is not None] == ["completed"]


ACCELERATED = """
import torch
from accelerate import Accelerator
from torch import nn
torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
nn.init.zeros_(model[2].weight)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
for _ in range(5):
    optimizer.zero_grad()
    accelerator.backward(model(torch.ones(2, 3)).sum() * (1 + 2 * accelerator.process_index))
    optimizer.step()
print(accelerator.num_processes, accelerator.distributed_type)
accelerator.end_training()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate_launch(server: Server, script: Path, ranks: int) -> None:
    """Two ranks on the CPU: what accelerate starts for several GPUs, with a script that asks for the CPU."""
    script.write_text(ACCELERATED, encoding="utf-8")
    how = ["--cpu"] if ranks == 1 else ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    done = launch(server, *accelerate, *how, *options, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 DistributedType.NO\n" if ranks == 1 else "2 DistributedType.MULTI_CPU\n" * 2
    assert len({registration.id for registration in server.registrations}) == 1
    assert server.registrations[0].name.startswith("train ")
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    # Two rows of ones for each of two outputs; over two ranks the mean of it and of three times it.
    assert server.values("grad_norm")["2.bias"] == pytest.approx(2 * 2**0.5 * ranks)
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("completed", None)  # it is a child that ends in its own time


def test_parameters_without_modules_take_the_optimizers_names(server: Server, script: Path) -> None:
    script.write_text(
        "import torch\n"
        "w = torch.ones(2, 3, requires_grad=True)\n"
        "o = torch.optim.SGD([('layer.w', w)], lr=0.1)\n"
        "w.sum().backward()\no.step()\n",
        encoding="utf-8",
    )
    assert launch(server, sys.executable, str(script)).returncode == 0
    assert server.names == ["layer.w"]
    assert server.values("grad_norm")["layer.w"] == pytest.approx(6**0.5)


COMPILED = """
import sys, torch
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 1)
    def forward(self, x):
        return self.two(self.one(x).tanh())
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
how, fullgraph = sys.argv[1], sys.argv[2] == "full"
if how == "in place":
    model.compile(backend=backend, fullgraph=fullgraph)
    forward = model
else:
    forward = torch.compile(model if how == "module" else lambda x: model(x), backend=backend, fullgraph=fullgraph)
for _ in range(5):
    optimizer.zero_grad()
    forward(torch.ones(2, 3)).sum().backward()
    optimizer.step()
print(len(graphs), [parameter.tolist() for parameter in model.parameters()])
"""


@pytest.mark.parametrize(
    ("how", "graphs"), [("module", "full"), ("module", "parts"), ("in place", "full"), ("function", "full")]
)
def test_a_compiled_training_compiles_and_ends_as_without(server: Server, script: Path, how: str, graphs: str) -> None:
    script.write_text(COMPILED, encoding="utf-8")
    plain = subprocess.run(
        [sys.executable, str(script), how, graphs], capture_output=True, text=True, check=True, timeout=600
    )
    assert plain.stdout.startswith("1 ")
    done = launch(server, sys.executable, str(script), how, graphs)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, plain.stderr)
    assert server.names == ["one.weight", "one.bias", "two.weight", "two.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


def test_models_that_are_not_trained_are_let_go_and_not_watched(server: Server, script: Path) -> None:
    script.write_text(
        "import gc, weakref, torch\n"
        "from torch import nn\n"
        "alive = []\n"
        "for _ in range(20):\n"
        "    candidate = nn.Sequential(nn.Linear(3, 4))\n"
        "    candidate(torch.ones(1, 3))\n"
        "    alive.append(weakref.ref(candidate))\n"
        "teacher = candidate\n"
        "del candidate\n"
        "print(sum(model() is not None for model in alive))\n"
        "if True:\n" + "".join(f"    {line}\n" for line in SCRIPT.splitlines()) + "del model, optimizer, teacher\n"
        "gc.collect()\n"
        "print(sum(type(found) is nn.Linear for found in gc.get_objects()))\n",
        encoding="utf-8",
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\nout\n0\n", "err\n")
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(server.samples) == 5


def test_two_networks_that_are_trained_in_turns_are_both_watched(server: Server, script: Path) -> None:
    """As in the usual training of a GAN: the discriminator's first backward pass comes before the generator ran."""
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "g, d = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(3, 1))\n"
        "og, od = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (g, d))\n"
        "for _ in range(3):\n"
        "    od.zero_grad()\n"
        "    d(torch.ones(1, 3)).sum().backward()\n"
        "    od.step()\n"
        "    og.zero_grad()\n"
        "    d(g(torch.ones(1, 2))).sum().backward()\n"
        "    og.step()\n",
        encoding="utf-8",
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.names == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3]


def test_an_optimizer_that_is_made_after_the_first_backward_pass(server: Server, script: Path) -> None:
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(2, 3))\n"
        "model(torch.ones(1, 2)).sum().backward()\n"
        "torch.optim.SGD(model.parameters(), lr=0.1).step()\n",
        encoding="utf-8",
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.names == ["0.weight", "0.bias"]
    assert [sample.step for sample in server.samples] == [1]


FOLDS = """
import torch
from torch import nn
kept = []
for fold in range(3):
    model = nn.Sequential(nn.Linear(2 + fold, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if KEPT:
        kept.append(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.ones(1, 2 + fold)).sum().backward()
        optimizer.step()
"""


def names_by_run(server: Server) -> dict[str, str]:
    """Return the name of each run, in the order in which they began."""
    begun = sorted(server.registrations, key=lambda registration: registration.started_at or 0.0)
    return {str(registration.id): registration.name for registration in begun}


def test_each_fold_of_a_program_is_a_run(server: Server, script: Path) -> None:
    script.write_text(FOLDS.replace("KEPT", "False").replace("STEPS", "5"), encoding="utf-8")
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = names_by_run(server).values()
    assert first.startswith("train ")
    assert others == [f"{first} #2", f"{first} #3"]
    assert [sample.step for sample in server.samples] == [step for step in (1, 2, 3, 4, 5) for _ in range(3)]
    ends = [batch.end for batch in server.batches if batch.end is not None]
    assert (
        sorted((end.status, str(end.exit_code)) for end in ends) == [("completed", "0")] + [("completed", "None")] * 2
    )


def test_runs_without_end_are_bounded_and_it_says_so(server: Server, script: Path) -> None:
    """As of meta-learning, which trains a copy of its model for each task."""
    folds = FOLDS.replace("KEPT", "False").replace("STEPS", "5")
    script.write_text(f"import gradwatch.launch.auto_runs as t\nt._MOST_RUNS = 2\n{folds}", encoding="utf-8")
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "it has begun 2 runs" in done.stderr
    assert len(names_by_run(server)) == 2
    assert len(server.samples) == 10


def test_a_fold_whose_optimizer_is_kept_is_over_when_the_next_goes_on(server: Server, script: Path) -> None:
    """What comes of the program is told of the last fold alone."""
    folds = FOLDS.replace("KEPT", "True").replace("STEPS", "110")
    script.write_text(f"{folds}\nraise SystemExit(3)", encoding="utf-8")
    assert launch(server, sys.executable, str(script)).returncode == 3
    assert len(server.samples) == 330
    ends = [batch.end for batch in server.batches if batch.end is not None]
    assert sorted((end.status, end.exit_code) for end in ends[:2]) == [("completed", None)] * 2
    assert [(end.status, end.exit_code) for end in ends[2:]] == [("failed", 3)]


def test_objects_that_the_program_has_frozen_are_found(server: Server, script: Path) -> None:
    frozen = "import gc\ngc.collect()\ngc.freeze()\nfor _ in range(5):"
    script.write_text(
        SCRIPT.replace("for _ in range(5):", frozen) + "print(gc.get_freeze_count() > 0)", encoding="utf-8"
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stdout) == (0, "out\nTrue\n")
    assert len(server.samples) == 5


def test_a_backward_pass_of_something_else_comes_first(server: Server, script: Path) -> None:
    script.write_text(f"import torch\ntorch.ones(3, requires_grad=True).sum().backward()\n{SCRIPT}", encoding="utf-8")
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert sorted(server.trail("loss")) == [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


def test_a_second_optimizer_of_a_watched_model_begins_no_run(server: Server, script: Path) -> None:
    again = SCRIPT.partition("model = ")[2].partition("\n")[2]
    script.write_text(SCRIPT + again, encoding="utf-8")
    assert launch(server, sys.executable, str(script)).returncode == 0
    assert len(names_by_run(server)) == 1
    assert [sample.step for sample in server.samples] == list(range(1, 11))


def test_a_network_that_joins_another_one_has_a_run_beside_it(server: Server, script: Path) -> None:
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def step(model, optimizer):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n"
        "first, second = nn.Linear(2, 1), nn.Linear(2, 3)\n"
        "one = torch.optim.SGD(first.parameters(), lr=0.1)\n"
        "step(first, one)\n"
        "two = torch.optim.SGD(second.parameters(), lr=0.1)\n"
        "for _ in range(2):\n"
        "    step(first, one)\n"
        "    step(second, two)\n",
        encoding="utf-8",
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(names_by_run(server)) == 2
    assert [sample.step for sample in server.samples] == [1, 1, 2, 2, 3]
    assert [batch.end.status for batch in server.batches if batch.end is not None] == ["completed"] * 2


def test_a_program_that_attaches_by_itself_is_watched_once(server: Server, script: Path) -> None:
    script.write_text(
        SCRIPT.replace("for _ in", "import gradwatch\nagent = gradwatch.attach(model, optimizer)\nfor _ in"),
        encoding="utf-8",
    )
    done = launch(server, sys.executable, str(script))
    assert (done.returncode, done.stderr) == (0, "err\n")
    assert len({registration.id for registration in server.registrations}) == 1
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


def ends(server: Server) -> dict[str, tuple[str, int | None]]:
    """Return how each run ended last, by its name."""
    names = {str(registration.id): registration.name for registration in server.registrations}
    return {
        names[server.run_of[batch.id]]: (batch.end.status, batch.end.exit_code)
        for batch in server.batches
        if batch.end is not None
    }


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("", ("completed", None)),
        ("raise ValueError", ("failed", None)),
        ("sys.exit(3)", ("failed", 3)),
        # Nobody knows more of one that dies without a word than how the command ended.
        (KILLED.replace("15", "9"), ("completed", 0)),
    ],
)
def test_a_training_in_a_child_ends_as_the_child_does(
    server: Server, script: Path, tmp_path: Path, ending: str, told: tuple[str, int | None]
) -> None:
    script.write_text(f"{COUNTED}{SCRIPT}\n{ending}", encoding="utf-8")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, subprocess, sys\n"
        "for name in ('one', 'two'):\n"
        f"    subprocess.run([sys.executable, {str(script)!r}], env={{**os.environ, 'GRADWATCH_RUN': name}})\n",
        encoding="utf-8",
    )
    assert launch(server, sys.executable, str(driver)).returncode == 0
    assert ends(server) == {"one": told, "two": told}
    assert len(server.samples) == 10


def test_what_the_program_says_of_its_own_runs_stands(server: Server, script: Path) -> None:
    attached = "import gradwatch\nagent = gradwatch.attach(model, every=1, run='a')\nfor _ in"
    script.write_text(SCRIPT.replace("for _ in", attached) + "agent.close(status='failed')\n", encoding="utf-8")
    assert launch(server, sys.executable, str(script)).returncode == 0
    assert ends(server) == {"a": ("failed", None)}


def test_a_training_that_goes_on_in_the_background_is_left_alone(server: Server, script: Path, tmp_path: Path) -> None:
    """It ends its run by itself, later."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    os.mkfifo(begun)
    os.mkfifo(go)
    text = SCRIPT.replace("print(", "0 and print(")
    script.write_text(f"{text}\nopen({str(begun)!r}, 'w').close()\nopen({str(go)!r}).read()", encoding="utf-8")
    command = f"{sys.executable} {script} > /dev/null 2>&1 & cat {begun}"
    assert launch(server, "bash", "-c", command, GRADWATCH_RUN="behind").returncode == 0
    assert not ends(server)
    go.write_text("", encoding="utf-8")
    server.wait(lambda: any(batch.end is not None for batch in server.batches))
    assert ends(server) == {"behind": ("completed", None)}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(server: Server, script: Path, number: signal.Signals) -> None:
    """As after ``nohup``, or in the background of a script."""
    script.write_text(
        f"{SCRIPT}import os, signal\nprint(signal.getsignal({int(number)}) is signal.SIG_IGN)\n"
        f"for process in (os.getpid(), os.getppid()): os.kill(process, {int(number)})\n",
        encoding="utf-8",
    )
    ignoring = (
        "import signal, sys; from gradwatch.cli import main; "
        f"signal.signal({int(number)}, signal.SIG_IGN); sys.exit(main())"
    )
    command = [sys.executable, "-c", ignoring, "run", "--url", server.url, "--", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (0, "out\nTrue\n")


def test_the_run_ends_where_no_spool_can_be_written(server: Server, script: Path) -> None:
    script.write_text(f"{SCRIPT}\nsys.exit(7)", encoding="utf-8")
    done = launch(server, sys.executable, str(script), GRADWATCH_SPOOL_DIR="/proc/nowhere")
    assert (done.returncode, done.stderr.count("cannot be used")) == (7, 1)
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == ("failed", 7)
    assert len(server.samples) == 5


def test_many_runs_and_a_server_that_is_gone(script: Path, tmp_path: Path, server: Server) -> None:
    """It is asked once, what waits is told once, and delivered when the server is there.

    Also of a program that has left the folder which the spool's is named from.
    """
    script.write_text(
        "import os\nos.chdir('/')\n" + FOLDS.replace("KEPT", "False").replace("STEPS", "5"), encoding="utf-8"
    )
    gone = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "gradwatch", "run", "--url", gone, "--every", "1", "--"]
    environment = {**os.environ, "GRADWATCH_SPOOL_DIR": "waiting"}
    done = subprocess.run(
        [*command, sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
        cwd=tmp_path,
    )
    cannot, wait = done.stderr.splitlines()
    assert done.returncode == 0
    assert "the server cannot be reached" in cannot
    assert "gradwatch flush delivers them" in wait
    flush = [sys.executable, "-m", "gradwatch", "flush", "--url", server.url]
    assert subprocess.run(flush, check=False, timeout=300, env=environment, cwd=tmp_path).returncode == 0
    assert len(server.samples) == 15
    assert len(ends(server)) == 3
    assert not list((tmp_path / "waiting").glob("*.spool"))


def test_a_server_that_does_not_answer_is_asked_once(server: Server, tmp_path: Path) -> None:
    server.answer = lambda *_: (503, {}, b"later")
    runs = [f"run-{place:016x}" for place in range(3)]
    for run in runs:
        spool = Spool(tmp_path, url=server.url, run=run, dropped=Dropped(), warn=print)
        spool.append("registration", wire.encode(wire.Registration(parameters=[], id=run)))
        spool.append("batch", wire.encode(wire.Batch(id=run, attempt=1)))
        spool.close()
    settings = resolve(environment={"GRADWATCH_SPOOL_DIR": str(tmp_path)})
    _deliver_spools(runs, settings, time.monotonic() + 60.0)
    assert len(server.requests) == 1
    server.answer = None
    _deliver_spools(runs, settings, time.monotonic() + 60.0)
    assert [batch.id for batch in server.batches] == runs
    assert not list(tmp_path.glob("*.spool"))
