"""A job that is interrupted and started again goes on as one run; trainings that only look alike stay apart."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import distributed, nn

from gradwatch.lifecycle import job
from gradwatch.lifecycle.job import Job, job_of, process_of, this_job
from gradwatch.lifecycle.resumption import ATTRIBUTE, Resumable, begin_run, interrupted, resume
from gradwatch.ranks.exchange import RankExchange
from gradwatch.settings import resolve
from tests.processes import PATIENCE_SECONDS, GradwatchServer, environment

TRAIN = """
import os, signal, sys, torch, gradwatch
from torch import nn
steps, end = int(os.environ["STEPS"]), os.environ["END"]
model = nn.Linear(3, int(os.environ.get("WIDTH", "2")))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
agent = gradwatch.attach(model, optimizer, every=1, step=int(os.environ["STEP"]) if "STEP" in os.environ else None)
for _ in range(steps):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
print(agent.run_id, agent.step, flush=True)
if end == "waits":
    sys.stdin.readline()
if end in ("killed", "waits"):
    agent._session._collector.finish(None, 60.0, device_failed=False)
    agent._session._delivery.sender.deliver()
    os.kill(os.getpid(), signal.SIGKILL)
if end == "failed":
    sys.exit(3)
"""
NO_JOB = dict.fromkeys(
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "KUBERNETES_SERVICE_HOST", "TORCHELASTIC_RUN_ID", "HOSTNAME"), ""
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradwatchServer]:
    with GradwatchServer(tmp_path_factory.mktemp("server") / "gradwatch.db") as started:
        yield started


class Program:
    """A training as a job starts it, again and again."""

    def __init__(self, server: GradwatchServer, folder: Path, project: str) -> None:
        self._server, self._folder, self._project = server, folder, project
        self.script = folder / "train.py"
        self.script.write_text(TRAIN, encoding="utf-8")

    def start(self, *arguments: str, steps: int = 3, end: str = "killed", **variables: str) -> subprocess.Popen[str]:
        given = {"GRADWATCH_URL": self._server.url, "GRADWATCH_PROJECT": self._project, "STEPS": str(steps), "END": end}
        given["GRADWATCH_RESUME_SECONDS"] = str(PATIENCE_SECONDS)
        return subprocess.Popen(
            [sys.executable, str(self.script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**NO_JOB | given | {"GRADWATCH_SPOOL_DIR": str(self._folder)} | variables),
        )

    def run(self, *arguments: str, **options: Any) -> tuple[str, int]:
        """Return the run of a training, and its last step."""
        output, _ = self.start(*arguments, **options).communicate()
        run, step = output.split()
        return run, int(step)

    def runs(self) -> int:
        return len(self._server.get("/api/v1/runs", project=self._project))


@pytest.fixture
def program(real: GradwatchServer, tmp_path: Path, request: pytest.FixtureRequest) -> Program:
    return Program(real, tmp_path, request.node.name)


def test_a_requeued_job_goes_on_with_its_run(real: GradwatchServer, program: Program) -> None:
    first, _ = program.run(SLURM_JOB_ID="17")
    second, step = program.run(end="completed", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    assert (second, step) == (first, 6)
    run = real.get(f"/api/v1/runs/{first}")
    assert (run["state"], run["status"], run["last_step"], program.runs()) == ("finished", "completed", 6, 1)
    loss = real.get(f"/api/v1/runs/{first}/series", statistic="loss", points=100)
    assert loss["steps"] == [1, 2, 3, 4, 5, 6]


def test_the_step_of_the_checkpoint_wins(real: GradwatchServer, program: Program) -> None:
    first, _ = program.run(GRADWATCH_RUN_KEY="k")
    assert program.run(GRADWATCH_RUN_KEY="k", STEP="2") == (first, 5)
    assert program.run(GRADWATCH_RUN_KEY="k") == (first, 8)


@pytest.mark.parametrize(("first", "second"), [({"end": "completed"}, {}), ({}, {"WIDTH": "4"})])
def test_trainings_that_are_not_the_same_stay_apart(
    program: Program, first: dict[str, str], second: dict[str, str]
) -> None:
    earlier, _ = program.run(GRADWATCH_RUN_KEY="k", **first)
    later, step = program.run(GRADWATCH_RUN_KEY="k", **second)
    assert (later != earlier, step) == (True, 3)


def test_a_training_is_known_by_job_program_arguments_and_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def training(*arguments: str, key: str = "k", name: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(job, "_trainings", {})  # as in a new process
        return this_job({"GRADWATCH_RUN_KEY": key}, name, "weights").training

    seen = [training(), training("--seed=1"), training(key="l"), training(name="a name")]
    assert len(set(seen)) == len(seen)
    assert seen == [training(), training("--seed=1"), training(key="l"), training(name="a name")]
    again = this_job({"GRADWATCH_RUN_KEY": "k"}, "a name", "weights")
    assert again.training not in seen  # the second one of a process
    monkeypatch.setattr(sys, "argv", [script := str(Path("train.py").absolute())])
    program = this_job({}, "", "weights").program
    monkeypatch.chdir(tmp_path)
    assert training() not in seen
    monkeypatch.setattr(sys, "argv", [script])
    elsewhere = this_job({"GRADWATCH_RUN_KEY": "k"}, "", "weights")
    assert elsewhere.training not in seen
    assert elsewhere.program == program  # a checkpoint may be restored in another directory


def test_two_at_the_same_time_share_nothing(program: Program) -> None:
    first = program.start(end="waits", GRADWATCH_RUN_KEY="k")
    assert first.stdout is not None
    running = first.stdout.readline().split()[0]
    other, _ = program.run(GRADWATCH_RUN_KEY="k")
    assert other != running
    first.communicate("\n")


def test_trainings_that_follow_each_other_in_a_job_stay_apart(program: Program) -> None:
    """The first one was killed, and the job goes on with the next one."""
    first, _ = program.run(SLURM_JOB_ID="17")
    second, step = program.run(SLURM_JOB_ID="17")
    assert (second != first, step) == (True, 3)


def test_what_failed_goes_on_where_it_was_started_again(program: Program) -> None:
    first, _ = program.run(end="failed", SLURM_JOB_ID="17")
    assert program.run(SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1") == (first, 6)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, ""),
        ({"TORCHELASTIC_RUN_ID": "none"}, ""),
        ({"TORCHELASTIC_RUN_ID": "", "SLURM_JOB_ID": ""}, ""),
        ({"TORCHELASTIC_RUN_ID": "job7"}, "torchelastic"),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "job7", "SLURM_JOB_ID": "3"}, "slurm"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "bert-x7k2p"}, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "notebook"}, ""),
        ({"HOSTNAME": "bert-x7k2p"}, ""),
        ({"GRADWATCH_RUN_KEY": "k", "SLURM_JOB_ID": "3"}, "key"),
    ],
)
def test_the_jobs_that_are_known(variables: dict[str, str], kind: str) -> None:
    assert job_of(variables)[0] == kind


def test_the_pods_of_a_job_are_one_job() -> None:
    pods = [{"KUBERNETES_SERVICE_HOST": "x", "HOSTNAME": f"bert-{suffix}"} for suffix in ("x7k2p", "b8c9d")]
    assert job_of(pods[0]) == job_of(pods[1])
    indexed = [pods[0] | {"JOB_COMPLETION_INDEX": index} for index in "01"]
    assert job_of(indexed[0]) != job_of(indexed[1])
    assert job_of(indexed[0] | {"JOB_NAME": "t"}) != job_of(indexed[0])
    # Jenkins sets this one.
    assert job_of(pods[0] | {"JOB_NAME": "team/train"}) == job_of(pods[0])
    assert job_of(pods[0] | {"JOB_NAME": "team/train", "HOSTNAME": "agent"}) == ("", "")


POD = {"KUBERNETES_SERVICE_HOST": "x", "HOSTNAME": "bert-x7k2p"}
OTHER_POD = POD | {"HOSTNAME": "bert-b8c9d"}
INDEX_0 = POD | {"HOSTNAME": "bert-0", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("earlier", "later", "status", "silent_seconds", "goes_on"),
    [
        (POD, OTHER_POD, None, 0.5, False),
        (POD, OTHER_POD, None, 299.0, False),
        (POD, OTHER_POD, None, 301.0, True),
        (POD, OTHER_POD, "killed", 0.5, True),
        (POD, OTHER_POD, "failed", 0.5, False),
        (INDEX_0, INDEX_0, None, 0.5, False),
        (INDEX_0, INDEX_0, "failed", 0.5, True),
        (INDEX_0, INDEX_0, "completed", 0.5, False),
    ],
)
def test_a_pod_follows_another_one_that_has_ended(
    monkeypatch: pytest.MonkeyPatch,
    earlier: dict[str, str],
    later: dict[str, str],
    status: str | None,
    silent_seconds: float,
    goes_on: bool,
) -> None:
    def started(variables: dict[str, str], namespace: str) -> Job:
        monkeypatch.setattr(job, "_trainings", {})  # as in a new process
        monkeypatch.setattr(job, "_namespace", lambda: namespace)  # as in another container
        return this_job(variables, "", "weights")

    before, mine = started(earlier, "pid:[1]"), started(later, "pid:[2]")
    run = Resumable("run-1", 1, status, 3, silent_seconds, {ATTRIBUTE: msgspec.json.encode(before).decode()}, "")
    assert (interrupted([run], mine) is not None) == goes_on


COUNTING = ("slurm", "torchelastic", "torchrun")
HERE = process_of(os.getpid())
GONE = msgspec.structs.replace(HERE, started="1")
ELSEWHERE = msgspec.structs.replace(HERE, host="another-machine")
SAME_NAME = msgspec.structs.replace(HERE, boot="another-boot")


@pytest.mark.parametrize(
    ("kind", "process", "status", "silent_seconds", "restarts", "goes_on"),
    [
        ("key", GONE, None, 0.5, 0, True),
        ("key", GONE, "killed", 0.5, 0, True),
        ("key", GONE, "failed", 0.5, 0, True),
        ("kubernetes", GONE, None, 0.5, 0, True),
        ("kubernetes", GONE, "failed", 0.5, 0, False),
        *((kind, GONE, status, 0.5, 0, False) for kind in COUNTING for status in (None, "killed", "failed")),
        *((kind, GONE, status, 0.5, 1, True) for kind in COUNTING for status in (None, "killed", "failed")),
        ("slurm", GONE, "completed", 0.5, 1, False),
        ("slurm", HERE, None, 1e6, 1, False),
        ("key", ELSEWHERE, None, 0.5, 0, False),
        ("key", SAME_NAME, None, 0.5, 0, False),
        ("key", SAME_NAME, None, 301.0, 0, True),
        ("key", ELSEWHERE, None, 299.0, 0, False),
        ("key", ELSEWHERE, None, 301.0, 0, True),
        ("slurm", ELSEWHERE, None, 0.5, 1, True),
        ("key", ELSEWHERE, "killed", 0.5, 0, True),
    ],
)
def test_only_what_was_interrupted_goes_on(
    kind: str, process: Any, status: str | None, silent_seconds: float, restarts: int, goes_on: bool
) -> None:
    mine = Job(kind, "t", "p", "weights", [restarts, 0], "", HERE)
    before = msgspec.structs.replace(mine, restarts=[0, 0], process=process)
    attributes = {ATTRIBUTE: msgspec.json.encode(before).decode()}
    run = Resumable("run-1", 1, status, 3, silent_seconds, attributes, "")
    assert (interrupted([run], mine) is not None) == goes_on


@pytest.mark.parametrize("kind", ["", *COUNTING])
def test_a_checkpoint_goes_on_without_a_restart(kind: str) -> None:
    mine = Job(kind, "t", "p", "weights", [0, 0], "", HERE)
    before = msgspec.structs.replace(mine, training="of another job", process=GONE)
    run = Resumable("run-1", 1, "failed", 3, 0.5, {ATTRIBUTE: msgspec.json.encode(before).decode()}, "")
    assert interrupted([run], mine) is None
    assert interrupted([run], mine, checkpoint="run-1") == run


def test_a_name_that_is_not_looked_up_in_time_does_not_delay_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def look_up(*_: Any, **__: Any) -> Any:
        goes_on.wait(PATIENCE_SECONDS)
        ended.set()
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    given = {"GRADWATCH_URL": "http://gradwatch.invalid", "GRADWATCH_RESUME_SECONDS": "0.05"}
    monkeypatch.setenv("GRADWATCH_RUN_KEY", "k")
    begun = begin_run(resolve(environment=given), [nn.Linear(2, 2)], None, 2, {}, checkpoint=None)
    assert not ended.is_set()
    assert not begun.resumed
    goes_on.set()
    assert ended.wait(PATIENCE_SECONDS)


def test_what_is_found_too_late_begins_no_attempt(real: GradwatchServer) -> None:
    mine = Job("key", "0123456789", "p", "weights", [0, 0], "", HERE)
    attributes = {ATTRIBUTE: msgspec.json.encode(msgspec.structs.replace(mine, process=GONE)).decode()}
    run = real.register(id="run-0123456789abcdef", project="late", attempt=1, attributes=attributes)
    given = {"GRADWATCH_URL": real.url, "GRADWATCH_PROJECT": "late", "GRADWATCH_RESUME_SECONDS": str(PATIENCE_SECONDS)}

    def attempt() -> int:
        (told,) = real.get("/api/v1/resumable", project="late", run=run)
        return int(told["attempt"])

    late = threading.Event()
    late.set()
    assert resume(resolve(environment=given), mine, 2, {}, checkpoint=None, late=late) is None
    assert attempt() == 1
    late.clear()
    begun = resume(resolve(environment=given), mine, 2, {}, checkpoint=None, late=late)
    assert begun is not None
    assert (begun.id, attempt()) == (run, 2)


def _store() -> Any:
    """Return a key-value store within this process."""
    return distributed.HashStore()  # type: ignore[attr-defined]


def test_other_ranks_hear_of_the_run_or_start_on_their_own() -> None:
    store = _store()
    first, other = (RankExchange("0", rank, 2, True, store) for rank in (0, 1))
    assert other.start(0.0) == ("", 0)  # the store's own limit are minutes
    told: list[tuple[str, int]] = []
    waiting = threading.Thread(target=lambda: told.append(other.start(PATIENCE_SECONDS)))
    waiting.start()
    first.tell_start("run-1", 7)
    waiting.join()
    assert told == [("run-1", 7)]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_the_connection_of_the_process_group_do_not_resume(
    real: GradwatchServer, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("GRADWATCH_RUN_KEY", "k")
    monkeypatch.setattr(job, "_trainings", {})  # as in a new process
    model, project = nn.Linear(2, 2), f"shared-{rank}"
    given = {"GRADWATCH_URL": real.url, "GRADWATCH_PROJECT": project, "GRADWATCH_RESUME_SECONDS": str(PATIENCE_SECONDS)}
    earlier = begin_run(resolve(environment=given), [model], None, 1, {}, checkpoint=None)
    mine = msgspec.json.decode(earlier.attributes[ATTRIBUTE], type=Job)
    attributes = {ATTRIBUTE: msgspec.json.encode(msgspec.structs.replace(mine, process=GONE)).decode()}
    real.register(id=earlier.id, project=project, attempt=1, attributes=attributes)
    store = _store()
    for own, run in ((False, ""), (True, earlier.id)):
        monkeypatch.setattr(job, "_trainings", {})
        if rank:
            RankExchange(str(own), 0, 2, True, store).tell_start(earlier.id, 7)
        ranks = RankExchange(str(own), rank, 2, True, store, own_connection=own)
        begun = begin_run(resolve(environment=given), [model], ranks, 2, {}, checkpoint=None)
        assert (begun.id if begun.resumed else "") == run


RESTARTED = """
import os, signal, torch, gradwatch
from torch import nn
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
agent = gradwatch.attach(model, optimizer, every=1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
if attempt == 0:
    agent.close(60.0, status="failed")
    raise RuntimeError("lost")
agent.close(60.0)
"""


def test_restarts_of_torchrun_are_attempts_of_one_run(real: GradwatchServer, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RESTARTED, encoding="utf-8")
    given = {"GRADWATCH_URL": real.url, "GRADWATCH_PROJECT": "restarts", "GRADWATCH_SPOOL_DIR": str(tmp_path)}
    given["GRADWATCH_RESUME_SECONDS"] = str(PATIENCE_SECONDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)]
    done = subprocess.run(command, env=environment(**NO_JOB | given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = real.get("/api/v1/runs", project="restarts")
    assert (run["status"], run["last_step"], run["sample_count"]) == ("completed", 6, 6)


KILLED_AT_STEP_5 = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
folder, restored = sys.argv[1], os.path.exists(sys.argv[1] + "/killed")

def die(agent, step):
    if step == 5 and not restored:
        agent._session._collector.finish(None, 60.0, device_failed=False)
        agent._session._delivery.sender.deliver()
        Path(folder, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

data = [{"x": torch.full((3,), float(index)), "labels": torch.tensor([1.0])} for index in range(32)]
"""
LIGHTNING = (
    KILLED_AT_STEP_5
    + """
import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from gradwatch.integrations.lightning import GradwatchCallback

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
    def training_step(self, batch):
        return (self.net(batch["x"]) - batch["labels"]).square().mean()
    def on_train_batch_start(self, batch, index):
        die(watching.agent, self.trainer.global_step)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

watching = GradwatchCallback(every=1)
saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=4, save_top_k=-1)
trainer = lightning.Trainer(max_steps=7, accelerator="cpu", logger=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=folder, callbacks=[watching, saving])
last = Path(folder, "last.ckpt")
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=last if last.exists() else None)
"""
)
TRANSFORMERS = (
    KILLED_AT_STEP_5
    + """
from transformers import Trainer, TrainerCallback, TrainingArguments
from gradwatch.integrations.transformers import GradwatchCallback

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)
    def forward(self, x, labels=None):
        out = self.inner(x)
        return {"loss": (out - labels).square().mean(), "logits": out}

class Killing(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        die(watching.agent, state.global_step)

watching = GradwatchCallback(every=1)
arguments = TrainingArguments(output_dir=folder, max_steps=7, per_device_train_batch_size=2, optim="sgd", report_to=[],
    use_cpu=True, save_steps=4, logging_strategy="no", disable_tqdm=True)
trainer = Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[watching, Killing()])
trainer.train(resume_from_checkpoint=restored)
"""
)


@pytest.mark.parametrize("script", [LIGHTNING, TRANSFORMERS], ids=["lightning", "transformers"])
def test_a_training_that_is_restored_from_its_checkpoint_goes_on(
    real: GradwatchServer, tmp_path: Path, script: str, request: pytest.FixtureRequest
) -> None:
    """Without any job: the checkpoint of step 4 names the run, which was killed at step 5."""
    program = tmp_path / "train.py"
    program.write_text(script, encoding="utf-8")
    project = request.node.name
    given = {"GRADWATCH_URL": real.url, "GRADWATCH_PROJECT": project, "GRADWATCH_SPOOL_DIR": str(tmp_path / "spool")}
    given["GRADWATCH_RESUME_SECONDS"] = str(PATIENCE_SECONDS)
    for status in (-9, 0):
        command = [sys.executable, str(program), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment(**NO_JOB | given), capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    (run,) = real.get("/api/v1/runs", project=project)
    assert (run["status"], run["last_step"]) == ("completed", 7)
    loss = real.get(f"/api/v1/runs/{run['id']}/series", statistic="loss", points=100)
    assert loss["steps"] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("given", "run"),
    [(True, "run-of-step-4"), ("", "run-of-step-4"), ("other", "run-of-other"), ("no\0path", "run-of-step-4")],
)
def test_the_checkpoint_that_a_trainer_names_is_looked_at_first(tmp_path: Path, given: str | bool, run: str) -> None:
    from transformers import TrainerState, TrainingArguments

    from gradwatch.integrations.transformers import _run_of_checkpoint

    for folder, content in (("checkpoint-4", "run-of-step-4"), ("other", "run-of-other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gradwatch_run.txt").write_text(f"{content}\n", encoding="utf-8")
    named = str(tmp_path / given) if given == "other" else given
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments.resume_from_checkpoint = named  # type: ignore[assignment]  # what users give, whatever its type
    assert _run_of_checkpoint(arguments, TrainerState(global_step=4)) == run
