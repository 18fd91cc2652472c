"""A run that is killed, stopped or loses its disk goes on to the same end, bit for bit: in processes of its own.

Importing PyTorch takes seconds, so runs are forked from two servers that have imported everything and done nothing
(`serve`). The two differ in their hash seed, and each attempt is forked from the other one than the last.
"""

import contextlib
import errno
import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    QUIET,
    assert_same_outcome,
    checkpoint_files,
    digit_net,
    leftovers,
    read_checkpoint,
    training_config,
)

import skd
from skd.data import calibration_loader, data_config, eval_loader, train_loader
from skd.data.digits import pixels
from skd.data.indexed import ArrayImages, PairSource
from skd.training import Stopped, checkpoints

FINISHED, STOPPED, FAILED = 0, 3, 4  # exit codes

FINISHED, STOPPED, FAILED = 0, 3, 4  # exit codes


# What runs in a process of its own


def serve():
    """For each request, a line of JSON on standard input: fork a run, answer its process id, then its exit code."""
    some_digits("train", 1)  # imports scikit-learn
    gc.freeze()  # a child that walks through all objects would copy them all
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            os._exit(attempt(**json.loads(line)))  # taking the interpreter down costs a second
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def some_digits(split, count):
    """The first of the digits, as a source of images."""
    images, labels = pixels()[split != "train"]
    return PairSource(ArrayImages(images[:count], labels[:count]), f"digits ({split})", "L")


def attempt(out, workers=0, hang=None, fire=None, tmpfs=None, **changes):
    """Train, or go on with, a network on the digits by skd's loaders; the exit code says how it ended."""
    out = Path(out)
    if tmpfs is not None:
        out.mkdir(exist_ok=True)
        if tmpfs:
            mount("-t", "tmpfs", "-o", f"size={tmpfs}", "none", str(out))
        else:
            mount("-o", "remount,size=64m", str(out))
    if hang is not None:
        hang_at(*hang, out.parent / "hanging")
    try:
        train_on_digits(out, workers, fire, changes)
    except Stopped as error:
        (out.parent / "message").write_text(str(error))
        return STOPPED
    except Exception as error:
        kept = {path.name: readable(path) for path in checkpoint_files(out)}
        document = [f"{type(error).__name__}: {error}", kept, leftovers(out)]
        (out.parent / "message").write_text(json.dumps(document))
        return FAILED
    if tmpfs is not None:  # nobody else sees what is mounted here
        shutil.copytree(out, out.parent / "copy")
    return FINISHED


def train_on_digits(out, workers, fire, changes):
    net = digit_net()
    config = data_config(net)
    train, test = some_digits("train", 103), some_digits("validation", 50)
    settings = training_config(**{"eval_every": 1, "drop_path": 0.2, "workers": workers, **changes})
    parts = settings.batch_size // settings.grad_accum_steps
    augmentation = {"scale": (0.6, 1.0), "reprob": 0.25, "color_jitter": 0.3, "aug_repeats": 2}
    calibration = calibration_loader(train, config, images=32, batch_size=16, workers=workers)
    list(calibration)  # as `skd.convert` does: its workers are older than the run
    batches = train_loader(train, config, batch_size=parts, seed=settings.seed, workers=workers, **augmentation)
    if fire is not None:
        batches = Firing(batches, *fire)
    validation = eval_loader(test, config, batch_size=32, workers=workers)
    skd.train(net, batches, validation, settings, calibration=calibration, out=out, resume="auto", console=QUIET)


class Firing:
    """A loader before whose batch `at` somebody else sends a signal to this process and all its workers."""

    def __init__(self, loader, at, name):
        self.loader, self.at, self.name, self.given = loader, at, name, 0

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch, start_batch=0):
        self.loader.set_epoch(epoch, start_batch)

    def __iter__(self):
        for batch in self.loader:
            if self.given == self.at:
                command = f"kill -s {self.name} -- -{os.getpgid(0)}"
                subprocess.run(["sh", "-c", command], start_new_session=True, check=True)
                time.sleep(0.3)  # until the workers are dead, if they die of it
            self.given += 1
            yield batch


def hang_at(where, number, marker):
    """Stop for ever in the middle of writing the checkpoint `number`, so that it can be killed there."""
    count = itertools.count()

    def hang():
        marker.write_text(where)
        time.sleep(60)

    save, replace = checkpoints.save_file, os.replace

    def half_saved(tensors, path, metadata=None):
        save(tensors, path, metadata=metadata)
        if next(count) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            hang()

    def not_replaced(source, target):
        if "step-" in Path(target).name and next(count) == number:
            if where == "after":
                replace(source, target)
            hang()
        replace(source, target)

    if where == "write":
        checkpoints.save_file = half_saved
    else:
        os.replace = not_replaced


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def readable(path):
    try:
        read_checkpoint(path)
    except Exception:
        return False
    return True


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt this process as at a terminal; a background job of a shell would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("interruptible")
def test_workers_outlive_a_signal(number):
    """Also those that are older than the run, and have not inherited its handlers: they have batches to deliver."""
    train = some_digits("train", 64)
    calibration = calibration_loader(train, data_config(digit_net()), images=64, batch_size=16, workers=1)
    expected = [images.sum().item() for images, _ in calibration]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    os.kill(workers[0].pid, number)
    time.sleep(0.1)
    assert [images.sum().item() for images, _ in calibration] == expected
    assert multiprocessing.active_children() == workers
    del calibration
    gc.collect()
    workers[0].join(20)
    assert not workers[0].is_alive()


# Its other end


class Server:
    """A process that forks runs, with this hash seed; `wrap` is put before its command."""

    def __init__(self, number, wrap=()):
        here = Path(__file__).parent
        paths = [str(Path(skd.__file__).parent.parent), str(here)]
        environment = os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-c", f"import {Path(__file__).stem} as tests; tests.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=here,
        )

    def wait_until_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def start(self, out, **request):
        """The process id of a new run."""
        self.process.stdin.write(json.dumps({"out": str(out), **request}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def result(self):
        """Its exit code, negative for a signal."""
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def can_mount():
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=100k none /mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def pair():
    """Two servers; where it is allowed, the second may mount file systems, which nobody else sees."""
    both = [Server(1), Server(2, ["unshare", "-rm"] if can_mount() else [])]
    for server in both:
        server.wait_until_ready()
    yield both
    for server in both:
        server.close()


@pytest.fixture(scope="module")
def servers(pair):
    return itertools.cycle(pair)


@pytest.fixture(scope="module")
def uninterrupted(servers, tmp_path_factory):
    """The folder of an uninterrupted run with these settings, and how long it took."""
    known = {}

    def get(**request):
        key = json.dumps(request, sort_keys=True)
        if key not in known:
            out, start = tmp_path_factory.mktemp("uninterrupted") / "run", time.perf_counter()
            server = next(servers)
            server.start(out, **request)
            assert server.result() == FINISHED, (out.parent / "message").read_text()
            known[key] = out, time.perf_counter() - start
        return known[key]

    return get


def assert_gone(group):
    """Assert that no process of a run is left; workers notice within seconds that the run was killed."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes of group {group} are left")


KINDS = {
    "plain": {"checkpoint_steps": 2},
    "accumulated": {"grad_accum_steps": 2, "sched_on_updates": True, "decay": "expected", "model_ema": False},
}
KINDS["accumulated"] |= {"checkpoint_steps": 1, "checkpoint_hist": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(tmp_path, servers, uninterrupted, kind):
    """SIGKILL at moments that nobody has chosen, then to the end: the same files as without."""
    expected, seconds = uninterrupted(**KINDS[kind])
    out, kills = tmp_path / "run", 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        server = next(servers)
        pid = server.start(out, **KINDS[kind])
        if kills == 0:
            wait_for(lambda: checkpoint_files(out))
        elif kills < 4:
            time.sleep(random.SystemRandom().uniform(0.02, 0.6) * seconds)
        if kills < 4:
            kill(pid, signal.SIGKILL)
        code = server.result()
        kills += code != FINISHED
        assert all(readable(path) for path in checkpoint_files(out))
    assert code == FINISHED, (tmp_path / "message").read_text()
    assert kills >= 1
    assert not leftovers(out / "checkpoints"), "half-written checkpoints pile up"
    remove_leftovers(out)
    assert_same_outcome(out, expected)


def kill(pid, number):
    """Kill a run, unless it has ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(found):
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline, "the run never came that far"
        time.sleep(0.005)


def remove_leftovers(out):
    """Remove small files that a killed process was writing and could not remove itself."""
    for path in out.rglob(".*"):
        path.unlink()


@pytest.mark.parametrize("where, number", [("write", 0), ("write", 3), ("before", 2), ("after", 0), ("after", 4)])
def test_killed_while_a_checkpoint_is_written(tmp_path, servers, uninterrupted, where, number):
    """Half of the file written; all of it, but under a temporary name; or nothing after it yet.

    There are five, of the steps 4, 6, 8, 12 and again 12 at the end of the epoch, of which two are kept.
    """
    settings = {"checkpoint_steps": 4, "epochs": 2, "progressive_epochs": 1}
    expected, _ = uninterrupted(**settings)
    server = next(servers)
    pid = server.start(tmp_path / "run", hang=[where, number], **settings)
    wait_for((tmp_path / "hanging").exists)
    os.kill(pid, signal.SIGKILL)
    assert server.result() == -signal.SIGKILL
    found = checkpoint_files(tmp_path / "run")
    steps = [4, 6, 8, 12, 12]
    assert len(found) == len({*steps[:number][-2:], *(steps[number:][:1] if where == "after" else [])})
    assert all(readable(path) for path in found)
    server = next(servers)
    server.start(tmp_path / "run", **settings)
    assert server.result() == FINISHED
    remove_leftovers(tmp_path / "run")
    assert_same_outcome(tmp_path / "run", expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_and_gone_on_with_other_workers(tmp_path, servers, uninterrupted, name):
    """None before, two after: the batches are the same. Stopping leaves a checkpoint and no process."""
    expected, seconds = uninterrupted(**KINDS["plain"])
    out, number = tmp_path / "run", getattr(signal, name)

    def newest():
        return max((int(path.stem.split("-")[1]) for path in checkpoint_files(out)), default=0)

    for workers, last in ((0, 2), (2, 8), (0, None)):
        server, before = next(servers), newest()
        pid = server.start(out, workers=workers, **KINDS["plain"])
        # On a busy machine a run may have come further before it was stopped than the next one is to come.
        if last is not None and before < last:
            # Or a later one, if that came and went between two looks.
            wait_for(lambda: newest() >= last)  # noqa: B023
            time.sleep(random.SystemRandom().uniform(0, 0.2) * seconds)
            kill(pid, number)
        code = server.result()
        assert_gone(pid)
        assert not leftovers(out)
        if code == FINISHED:
            break
        assert code == STOPPED
        message = (tmp_path / "message").read_text()
        assert message.startswith(f"stopped by {name}; go on from {checkpoint_files(out)[-1]}")
    assert code == FINISHED
    assert_same_outcome(out, expected)


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_to_the_workers_too(tmp_path, servers, uninterrupted, name):
    """Ctrl-C reaches all processes of a terminal, and systemd and SLURM send SIGTERM to a whole group."""
    expected, _ = uninterrupted(**KINDS["plain"])
    out = tmp_path / "run"
    server = next(servers)
    pid = server.start(out, workers=2, fire=[8, name], **KINDS["plain"])
    code = server.result()
    assert code == STOPPED, (tmp_path / "message").read_text()
    assert_gone(pid)
    server = next(servers)
    server.start(out, **KINDS["plain"])
    assert server.result() == FINISHED
    assert_same_outcome(out, expected)


@pytest.mark.skipif(not can_mount(), reason="file systems cannot be mounted here")
def test_a_disk_that_is_really_full(tmp_path, pair, uninterrupted):
    """A small file system, and after the failure a larger one."""
    settings = {"checkpoint_steps": 2, "checkpoint_hist": 9}
    expected, _ = uninterrupted(**settings)
    server = pair[1]
    server.start(tmp_path / "run", tmpfs="700k", **settings)
    assert server.result() == FAILED
    message, kept, left = json.loads((tmp_path / "message").read_text())
    assert message.startswith("OSError: ")
    assert "No space left" in message and f"os error {errno.ENOSPC}" in message
    assert f"the last whole checkpoint is {tmp_path / 'run' / 'checkpoints' / max(kept)}" in message
    assert len(kept) >= 2 and all(kept.values())
    assert left == []
    server.start(tmp_path / "run", tmpfs="", **settings)
    assert server.result() == FINISHED
    assert_same_outcome(tmp_path / "copy", expected)
