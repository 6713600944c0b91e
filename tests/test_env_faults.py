"""Environments that hang, interrupt, fail again and again, or outlive us:
none stops a run without a line.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from small_envs import faulty, maker, sleep, stuck
from test_vector import BOTH, gone, pids, play

import envs.worker
import forked
from envs import EnvError
from envs.vector import Envs
from hidreamer import app

ROOT = Path(__file__).parent.parent


def impatient(envs, seconds=0.5):
    """What is built by now gets this little time; replacements have as much as they want."""
    for worker in envs._workers:
        worker._timeout = seconds
    return envs


@pytest.fixture
def signals_as_before():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGALRM)}
    began, (left, _) = (
        time.monotonic(),
        signal.getitimer(signal.ITIMER_REAL),
    )  # pytest-timeout has one
    yield
    assert {signum: signal.getsignal(signum) for signum in before} == before
    expected = left - (time.monotonic() - began) if left else 0.0
    assert abs(signal.getitimer(signal.ITIMER_REAL)[0] - expected) < 0.1


# ------------------------------------------------------------------------------------------ hanging


@pytest.mark.parametrize(("parallel", "fault"), [(False, sleep), (True, sleep), (True, stuck)])
@pytest.mark.parametrize("method", ["step", "reset"])
def test_a_hung_environment_is_ended_and_replaced(method, parallel, fault, signals_as_before):
    after = {"step": 3, "reset": 1}[method]
    vector = impatient(Envs(faulty(method, fault, after=after), 2, parallel, timeout=60))
    started = time.monotonic()
    with pytest.warns(
        RuntimeWarning,
        match=r"^environment 0 crashed and is replaced: no answer within 0.5 s \(env.ti",
    ):
        outputs = play(vector, 30)
    assert vector.restarts == 1 and time.monotonic() - started < 20
    last = np.stack([output["is_last"] for output in outputs])
    if method == "step":
        assert last[4].tolist() == [True, False] and outputs[5]["is_first"].tolist() == [
            True,
            False,
        ]
    vector.close()


def test_all_that_hang_at_once_are_waited_for_once():
    vector = Envs(
        lambda index, restart: faulty("step", sleep, index=index)(index, restart), 4, True
    )
    vector.step(None)
    workers = pids(vector)
    os.kill(workers[3], signal.SIGSTOP)
    for worker in impatient(vector, 1.0)._workers:
        worker.send("step", np.eye(4, dtype=np.float32)[0])
    started = time.monotonic()
    for worker in vector._workers:
        assert str(worker.answer()) == "no answer within 1 s (env.timeout)"
    assert time.monotonic() - started < 3.0
    vector.close()
    assert gone(workers)


@BOTH
def test_an_environment_that_is_never_built_is_one_line(parallel):
    started = time.monotonic()
    with pytest.raises(
        EnvError, match=r"^environment 0 cannot be built: no answer within 1 s \(env.timeout\)$"
    ):
        Envs(faulty("construct", sleep), 1, parallel, timeout=1.0)
    assert time.monotonic() - started < 20


@BOTH
def test_states_and_pictures_that_hang(parallel, signals_as_before):
    vector = impatient(Envs(faulty("get_state", sleep), 2, parallel, timeout=60))
    play(vector, 3)
    with pytest.warns(
        RuntimeWarning, match="environment 0 could not save its state: no answer within 0.5 s"
    ):
        states = vector.state()
    assert states[0] is None and states[1] is not None
    other = impatient(Envs(faulty("set_state", sleep), 2, parallel, timeout=60))
    assert other.load_state([states[1], states[1]]).tolist() == [False, True]
    pictures = impatient(Envs(faulty("render", sleep), 1, parallel, timeout=60))
    pictures.step(None)
    with pytest.raises(EnvError, match=r"environment 0 cannot be drawn: no answer within 0.5 s"):
        pictures.render(0)
    if parallel:  # then the process was ended for it, and the next step says why
        with pytest.warns(
            RuntimeWarning, match="environment 0 crashed and is replaced: no answer within 0.5 s"
        ):
            play(pictures, 1, start=False)


@BOTH
def test_closing_hung_environments_takes_one_patience(parallel, monkeypatch, signals_as_before):
    monkeypatch.setattr(envs.worker, "PATIENCE", 1.0)
    vector = Envs(
        lambda index, restart: faulty("close", sleep, index=index)(index, restart), 4, parallel
    )
    workers = pids(vector) if parallel else []
    started = time.monotonic()
    vector.close()
    assert time.monotonic() - started < 3.0 and gone(workers)


def test_somebody_elses_alarm_rings_after_the_call(signals_as_before):
    rung = []
    timer, handler = (
        signal.setitimer(signal.ITIMER_REAL, 0),
        signal.signal(signal.SIGALRM, lambda *_: rung.append(1)),
    )
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert envs.worker._call(lambda: time.sleep(0.3) or list(rung), 60) == []
        time.sleep(0.1)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
        if timer[0]:
            signal.setitimer(signal.ITIMER_REAL, timer[0] - (time.monotonic() - began))


# ---------------------------------------------------------------- what no Exception is, and is ours


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    ("parallel", "handler"), [(False, "python"), (False, "run"), (True, "run")]
)
def test_an_environment_may_not_interrupt_us(kind, handler, parallel, signals_as_before, request):
    if handler == "run":  # as dreamer.py
        before = signal.signal(signal.SIGINT, lambda *_: None)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def fault(*_):
        raise kind("away")

    for method in ("step", "reset"):
        vector = Envs(faulty(method, fault), 2, parallel)
        with pytest.warns(
            RuntimeWarning,
            match=rf"^environment 0 crashed .*: {kind.__name__}: away \(test_env_faults",
        ):
            play(vector, 3)
        assert vector.restarts == 1
    with pytest.raises(
        EnvError,
        match=rf"^environment 0 cannot be built: {kind.__name__}: away \(test_env_faults.py",
    ):
        Envs(faulty("construct", fault), 2, parallel)
    vector = Envs(faulty("render", fault), 1, parallel)
    vector.step(None)
    with pytest.raises(EnvError, match=rf"environment 0 cannot be drawn: {kind.__name__}: away"):
        vector.render(0)
    Envs(faulty("close", fault), 1, parallel).close()
    del vector
    gc.collect()


def test_the_users_interrupt_is_the_users(signals_as_before):
    def pressed(*_):
        signal.raise_signal(signal.SIGINT)

    def swallowed(*_):
        try:
            pressed()
        except BaseException:
            return {}

    for fault in (pressed, swallowed):
        vector = Envs(faulty("step", fault, restarts=9), 1, False, timeout=60)
        vector.step(None)
        with pytest.raises(KeyboardInterrupt):
            play(vector, 1, start=False)
        assert vector.restarts == 0


# ---------------------------------------------------------------------------------- again and again


@BOTH
def test_the_same_error_right_after_a_restart_is_not_tried_again(parallel, tmp_path):
    def fault(*_):
        try:
            raise LookupError("first")
        except LookupError as error:
            raise OSError(f"out of luck {np.random.default_rng().random()}") from error

    log = tmp_path / "new" / "errors.txt"
    for method in ("step", "reset"):
        vector = Envs(faulty(method, fault, restarts=99), 1, parallel, error_log=log)
        with (
            pytest.warns(RuntimeWarning) as warned,
            pytest.raises(
                EnvError,
                match=r"^environment 0 fails in the same way as before its restart: OSError: "
                r"out of luck [\d.e-]+ "
                rf"\(test_env_faults.py:\d+\); traceback: {log}$",
            ),
        ):
            play(vector, 30)
        assert vector.restarts == 1 == len(warned)
    text = log.read_text()
    assert (
        "in fault" in text
        and "LookupError: first" in text
        and text.count("environment 0, restart 0") == 2
    )
    assert text.count("OSError: out of luck") == 2  # each error once for each `Envs`
    with pytest.raises(EnvError, match=rf"cannot be built: OSError.*; traceback: {log}"):
        Envs(faulty("construct", fault), 1, parallel, error_log=log)
    unwritable = Envs(
        faulty("reset", fault, restarts=99), 1, parallel, error_log=log / "below a file"
    )
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(EnvError, match=r"\(test_env_faults.py:\d+\)$"),
    ):
        unwritable.step(None)


@BOTH
def test_an_error_at_another_step_of_its_episode_is_another(parallel):
    class Sometimes:
        def __init__(self, number, restart):
            self.env, self.left = maker("dummy_vector")(number, restart), 2 + restart

        def step(self, action):
            self.left -= 1
            if self.left < 0:
                raise OSError("now and then")
            return self.env.step(action)

        def __getattr__(self, name):
            return getattr(self.env, name)

    vector = Envs(Sometimes, 1, parallel)
    with (
        pytest.warns(RuntimeWarning, match="now and then"),
        pytest.raises(EnvError, match="environment 0 crashed 5 times without a whole episode"),
    ):
        play(vector, 40)
    assert vector.restarts == 4


@BOTH
def test_an_error_in_every_episode_ends_the_run(parallel):
    """Good steps before it prove nothing: with a replacement each time it would go on for ever."""

    def fault(*_):
        raise OSError("at the same step of all of them")

    vector = Envs(faulty("step", fault, restarts=99, after=3), 1, parallel)
    with (
        pytest.warns(RuntimeWarning, match="at the same step"),
        pytest.raises(EnvError, match="fails in the same way as before its restart"),
    ):
        play(vector, 40)
    assert vector.restarts == 1


@pytest.mark.parametrize("longest", [10**6, 30])
def test_whole_episodes_or_many_steps_of_one_prove_that_it_works(longest, monkeypatch):
    monkeypatch.setattr("envs.vector.GOOD_STEPS", longest)
    ends = 10 if longest == 10**6 else 10**6

    class Tired:
        """Breaks in its 35th step; its episodes have 10 steps, or no end."""

        def __init__(self, number, restart):
            self.env, self.steps = maker("dummy_vector")(number, restart), 0

        def step(self, action):
            self.steps += 1
            if self.steps == 35:
                raise OSError("tired")
            last = self.steps % ends == 0
            return self.env.step(action) | {"is_last": last, "is_terminal": last}

        def __getattr__(self, name):
            return getattr(self.env, name)

    vector = Envs(Tired, 1, False)
    with pytest.warns(RuntimeWarning, match="tired"):
        play(vector, 400)
    assert vector.restarts > 8


def test_warnings_of_a_process_are_one_line(capfd):
    def warn(number, restart):
        import warnings

        warnings.warn("mind the gap", UserWarning, stacklevel=1)
        return maker("dummy_vector")(number, restart)

    with contextlib.closing(Envs(warn, 1, True)) as vector:
        vector.step(None)
    assert capfd.readouterr().err == "warning: mind the gap\n"


def test_answers_that_cannot_travel_are_crashes():
    class Odd(EnvError):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    def odd(*_):
        raise Odd(1, 2)

    for method, fault in (("get_state", lambda: lambda: None), ("get_state", odd)):
        vector = Envs(faulty(method, fault), 2, True, timeout=60)
        play(vector, 2)
        with pytest.warns(RuntimeWarning, match="environment 0 could not save its state: "):
            assert [state is None for state in vector.state()] == [True, False]
        play(vector, 2, start=False)
        assert vector.restarts == 0
        vector.close()


# ----------------------------------------------------------------------------- outliving the parent

HUNG = """
    import sys
    sys.path.insert(0, {tests!r})
    from small_envs import faulty, sleep, stuck
    from envs.vector import Envs
    envs = Envs(faulty("step", {fault}, after=1), 2, True)
    envs.step(None)
    print(*(worker._process.pid for worker in envs._workers), flush=True)
    for _ in range(5):
        envs.step(__import__("numpy").eye(4, dtype="float32")[:2])
"""


def start(script, **popen):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **popen,
    )


@pytest.mark.parametrize("fault", ["sleep", "stuck"])
def test_a_hung_process_ends_with_its_parent(fault):
    parent = start(HUNG.format(tests=str(ROOT / "tests"), fault=fault))
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)  # now it hangs
    parent.kill()
    parent.wait()
    assert gone(workers)


# -------------------------------------------------------------------------------------- the command

MODULE = """
    import os, time
    import gymnasium as gym
    import numpy as np

    FAULT = os.environ["FAULT"]

    class E(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self, render_mode=None):
            self.steps = 0
            self.fault("construct")

        def fault(self, where):
            if FAULT == f"{where} hang":
                print("hangs", flush=True)
                time.sleep(1000)
            if FAULT == f"{where} interrupt":
                raise KeyboardInterrupt
            if FAULT == f"{where} error":
                raise LookupError("nothing there")

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            self.steps += 1
            self.fault("step")
            return self.observation_space.sample(), 1.0, self.steps % 5 == 0, False, {}

    gym.register("Faulty-v0", E)
"""


# dreamer.py with another length of its patience: signals.GRACE.
HURRIED = """
    import sys
    import dreamer, signals
    from hidreamer import app
    signals.GRACE = 1.5
    app.plain_warnings()
    sys.exit(dreamer.main(sys.argv[1:]))
"""


def arguments(tmp_path, *words):
    (tmp_path / "faultyenv.py").write_text(textwrap.dedent(MODULE))
    args = ["--configs", "gym", "debug", "--task", "gym_faultyenv:Faulty-v0"]
    return [*args, "--logdir", str(tmp_path / "run"), "--video", "false", *words]


def command(tmp_path, fault, *words, program=("dreamer.py",), start=forked.popen):
    return start(
        [sys.executable, *program, *arguments(tmp_path, *words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "FAULT": fault},
    )


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """here("step error") -> exit status and standard error of the same command in this process."""
    import dreamer

    monkeypatch.syspath_prepend(tmp_path)

    def run(fault, *words):
        monkeypatch.setenv("FAULT", fault)
        with warnings.catch_warnings():
            warnings.simplefilter("default", RuntimeWarning)
            app.plain_warnings()
            status = dreamer.main(arguments(tmp_path, *words))
        return status, capsys.readouterr().err

    yield run
    sys.modules.pop("faultyenv", None)
    gymnasium.registry.pop("Faulty-v0", None)


@pytest.mark.parametrize(
    ("fault", "words", "status", "line"),
    [
        (
            "construct hang",
            ["--env.timeout", "1"],
            2,
            "environment 0 cannot be built: no answer within 1 s",
        ),
        (
            "construct interrupt",
            [],
            2,
            r"environment 0 cannot be built: KeyboardInterrupt (faultyenv.py:",
        ),
        (
            "step interrupt",
            [],
            1,
            "environment 0 fails in the same way as before its restart: KeyboardInterrupt (",
        ),
        (
            "step error",
            ["--env.parallel", "true"],
            1,
            "before its restart: LookupError: nothing there (faultyenv.py:",
        ),
    ],
)
def test_a_run_with_a_broken_environment_ends_with_one_line(
    tmp_path, fault, words, status, line, here
):
    if words[:1] == ["--env.parallel"]:  # once as a program
        run = command(tmp_path, fault, *words, start=subprocess.Popen)
        _, error = run.communicate(timeout=120)
        found = run.returncode
    else:
        found, error = here(fault, *words)
    *warned, last = error.splitlines()
    assert found == status and last.startswith("error: ") and line in last, error
    assert all(line.startswith("warning: environment 0 crashed and is replaced") for line in warned)
    if "hang" not in fault:
        assert "faultyenv.py" in (tmp_path / "run" / "env_errors.txt").read_text()


def test_a_second_interrupt_ends_a_run_whose_environment_hangs(tmp_path):
    run = command(tmp_path, "step hang", "--env.timeout", "0")
    while "hangs" not in (line := run.stdout.readline()):
        assert line, "it ended"
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert run.poll() is None  # it waits for a moment in which it can be saved
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == -signal.SIGINT
    assert "Traceback" not in run.communicate()[1]


@pytest.mark.parametrize("parallel", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_termination_waits_ten_seconds_for_an_environment_that_hangs(tmp_path, parallel):
    """Not until env.timeout: who asks a job to end kills it soon after. Here not ten seconds."""
    import signals

    assert signals.GRACE == 10.0
    words = ["--env.timeout", "300", "--env.parallel", parallel]
    run = command(tmp_path, "step hang", *words, program=["-c", textwrap.dedent(HURRIED)])
    while "hangs" not in (line := run.stdout.readline()):
        assert line, "it ended"
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, error = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 40
    assert "SIGTERM: ending after the running step; Ctrl-C ends at once\n" in out
    assert error.startswith(
        "warning: environment 0 crashed and is replaced: no answer within 1.5 s of the signal"
    )
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").exists()


# --------------------------------------------------------------------------------------------- Doom


def games(ancestor):
    """{pid: instance} of the ViZDoom games below a process."""
    rows = subprocess.run(
        ["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True
    ).stdout.splitlines()
    parents = {int(row.split()[0]): int(row.split()[1]) for row in rows}
    found = {}
    for row in rows:
        pid = int(row.split()[0])
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and "+viz_instance_id" in row:
            found[pid] = row.split("+viz_instance_id")[1].split()[0]
    return found


def shared(found):
    """Files of the games' shared memory."""
    return [
        path for path in Path("/dev/shm").iterdir() if path.name.endswith(tuple(found.values()))
    ]


@pytest.mark.parametrize("parallel", ["false", "true"])
def test_a_killed_run_leaves_no_game_and_no_shared_memory_behind(parallel, tmp_path):
    pytest.importorskip("vizdoom")
    words = (
        "--configs vizdoom debug --env.count 2 --steps 100000 --eval_every 100 --eval_episodes 200 "
        "--video false"
    )
    run = subprocess.Popen(
        [
            sys.executable,
            "dreamer.py",
            *words.split(),
            "--env.parallel",
            parallel,
            "--logdir",
            str(tmp_path / "run"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        end = time.monotonic() + 120
        found = games(run.pid)
        while (
            len(found) < 4 or shared(found)
        ) and time.monotonic() < end:  # two that train, two that evaluate
            time.sleep(0.2)
            found = games(run.pid)
        assert len(found) == 4
    finally:
        run.kill()
        run.wait()
    assert gone(found) and shared(found) == []


def test_a_game_does_not_heed_the_terminal_and_ends_with_its_process():
    pytest.importorskip("vizdoom")
    vector = Envs(maker("vizdoom_basic"), 2, True)
    play(vector, 3)
    found = games(os.getpid())
    assert len(found) == 2
    for pid in found:
        os.kill(pid, signal.SIGINT)
    play(vector, 3, start=False)
    assert vector.restarts == 0
    for pid in pids(vector):
        os.kill(pid, signal.SIGKILL)  # nobody closes anything: the kernel ends the games
    assert gone(found) and shared(found) == []


def test_shared_memory_of_killed_starts_goes_with_the_next_one():
    pytest.importorskip("vizdoom")

    def leave(name, age):
        path = Path("/dev/shm", f"ViZDoomSM{name}{os.getpid()}")
        path.write_bytes(bytes(4096))
        os.utime(path, (time.time() - age,) * 2)
        return path

    old, used, young = leave("old", 3600), leave("used", 3600), leave("young", 0)
    code = (
        f"import mmap; f = open({str(used)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "print('mapped', flush=True)"
    )
    code += "; input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"mapped\n"
        maker("vizdoom_basic")(0, 0).close()
        assert not old.exists() and used.exists() and young.exists()
    finally:
        other.kill()
        other.communicate()
        for path in (old, used, young):
            path.unlink(missing_ok=True)
