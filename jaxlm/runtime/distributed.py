"""Several processes as one run: they are joined, compared, and ended together.

A process is a host of a TPU pod, or as many of a GPU machine as its launcher starts. All run the
same command; process 0 draws the progress bar and writes what is to be read.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cloud_tpu_init, distributed  # neither has a public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import InputError, report_input_errors

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN_TIMEOUT = "JAXLM_JOIN_TIMEOUT"  # seconds to wait for all processes to start
_JOIN_S = 300
_POLL_S = 2.0
_SILENT_S = 45.0
_FOREVER_MS = 7 * 24 * 3600 * 1000  # a process that fails meanwhile ends all
_LEAVE_S = 10.0
_FAILED, _ALIVE, _LEFT = "jaxlm/failed", "jaxlm/alive", "jaxlm/left"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Around a training script, in every process, before JAX is used.

    Joins the processes that Cloud TPU, SLURM, Open MPI or Kubernetes started, or that the
    environment names (``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``); with
    none of these the process is alone. What ends one process ends all within a minute, each with
    that one's message: an error, bad input, a process that was killed.
    """
    with report_input_errors():
        _join()
        if _client() is None:
            yield
            return
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
        watcher.start()  # before JAX looks for devices, which may fail in one process alone
        try:
            yield
            # Who is through early must show signs of life until all are.
            _client().wait_at_barrier("jaxlm/through", _FOREVER_MS)
        except BaseException as error:
            over.set()
            if not isinstance(error, SystemExit) or error.code:
                _end_all(error)
            raise
        finally:
            over.set()
        watcher.join()


def check_same(topic: str, facts: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` in a process whose ``facts`` (JSON) are not those of process 0.

    Every process calls it once for a topic; none returns before all have compared.
    """
    if _client() is None:
        return
    key = f"jaxlm/facts/{topic}"
    if _index() == 0:
        _client().key_value_set(key, json.dumps(facts))
    there = json.loads(_client().blocking_key_value_get(key, _FOREVER_MS))
    here = json.loads(json.dumps(facts))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise InputError(
                f"{name} is {_short(here.get(name))} here, and {_short(there.get(name))} in "
                "process 0: all processes need the same code, packages, command and files"
            )
    _client().wait_at_barrier(f"jaxlm/same/{topic}", _FOREVER_MS)


@contextlib.contextmanager
def first(topic: str) -> Iterator[None]:
    """Process 0 goes first, then one of each other machine, then all that are left."""
    if _client() is None:
        yield
        return
    key, own = f"jaxlm/first/{topic}", _index()
    _client().key_value_set(f"{key}/machine/{own}", socket.gethostname())
    _client().wait_at_barrier(key, _FOREVER_MS)
    machines = {
        int(name.rpartition("/")[2]): machine
        for name, machine in _client().key_value_dir_get(f"{key}/machine")
    }
    leader = min(index for index, machine in machines.items() if machine == machines[own])
    for before in sorted({0, leader}):
        if before < own:
            _client().blocking_key_value_get(f"{key}/through/{before}", _FOREVER_MS)
    yield
    if own in (0, leader):
        _client().key_value_set(f"{key}/through/{own}", "")


def connect() -> None:
    """Let the CPUs of all processes find each other, before work that takes some of them longer.

    Gloo waits 30 s for that at the first sum over devices, and compiling may differ by more; once
    connected, CPUs wait for half an hour. NCCL and TPUs need nothing.
    """
    if _client() is None or jax.default_backend() != "cpu":
        return
    _client().wait_at_barrier("jaxlm/connect", _FOREVER_MS)
    mesh = Mesh(np.array(jax.devices()), "all")
    one_each, sum_of_all = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec("all"), PartitionSpec())
    )
    ones = jax.make_array_from_callback((mesh.size,), one_each, lambda _: np.ones(1))
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=sum_of_all)(ones))


def code_hash() -> str:
    """A sha256 of this package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _join() -> None:
    settings = _settings()
    if settings is None or jax.distributed.is_initialized():
        return
    given = os.environ.get(JOIN_TIMEOUT, str(_JOIN_S))
    if not given.isdigit():
        raise InputError(f"{JOIN_TIMEOUT}={given} is not a whole number of seconds")
    seconds = int(given)
    count = settings.get("num_processes", "the")
    where = settings.get("coordinator_address", "the address that the launcher gives")

    def give_up() -> None:  # the C++ code would abort with a stack trace
        print(
            f"error: after {seconds} s, {count} processes have not all joined at {where}: start "
            f"the same command on every host, and let them reach that one ({JOIN_TIMEOUT} sets "
            "how long to wait)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    if "process_id" in settings:  # two of one number end in a stack trace of the C++ code
        who = f"process {settings['process_id']} of {count}"
        print(f"joining at {where} as {who}", file=sys.stderr, flush=True)
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=seconds + 60)
    except RuntimeError as error:  # such as a port that is taken, or Kubernetes forbids to look
        raise InputError(f"the processes cannot join at {where}: {_first_line(error)}") from error
    except ValueError as error:
        raise InputError(
            f"the launcher's environment does not say how to join its processes ({error}): set "
            f"{ADDRESS}, {COUNT} and {INDEX} in each, or {COUNT}=1 if there is but one"
        ) from error
    finally:
        timer.cancel()


def _settings() -> dict[str, Any] | None:
    """Arguments of ``jax.distributed.initialize``; None where the process is alone."""
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if given.get(COUNT) == "1":
        return None
    if given:
        try:
            count, index = int(given[COUNT]), int(given[INDEX])
            address = given[ADDRESS]
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{error} in {given}: set {ADDRESS}=HOST:PORT of process 0, {COUNT}, and {INDEX} "
                "from 0, in every process"
            ) from error
        if not 0 <= index < count or not address.rpartition(":")[2].isdigit():
            raise InputError(
                f"{given} does not fit: {INDEX} counts from 0 to {COUNT}-1, and {ADDRESS} is "
                "HOST:PORT of process 0"
            )
        return {"coordinator_address": address, "num_processes": count, "process_id": index}
    launched = (
        os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" in os.environ,
        os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1",
        "JOB_COMPLETION_INDEX" in os.environ,  # an indexed Job of Kubernetes
        cloud_tpu_init.running_in_cloud_tpu_vm
        and os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu",
    )
    return {} if any(launched) else None


def _watch(over: threading.Event) -> None:
    """Until ``over``: show that this process lives, and end it when another has failed."""
    client, index = _client(), _index()
    seen: dict[str, tuple[str, float]] = {}  # by process: its last sign, and when it came
    for beat in itertools.count():
        if over.wait(_POLL_S * bool(beat)):
            return
        try:
            client.key_value_set(f"{_ALIVE}/{index}", str(beat), allow_overwrite=True)
            failures = client.key_value_dir_get(_FAILED)
            if index == 0 and not failures:
                failures = _silent(dict(client.key_value_dir_get(_ALIVE)), seen)
                for key, message in failures:
                    client.key_value_set(key, message)
        except jax.errors.JaxRuntimeError as error:
            failures = [(_FAILED, f"process 0 cannot be reached any more ({_first_line(error)})")]
        if failures and not over.is_set():
            print(f"error: {failures[0][1]}", file=sys.stderr, flush=True)
            _go(1)


def _silent(signs: dict[str, str], seen: dict[str, tuple[str, float]]) -> list[tuple[str, str]]:
    """A message for each process whose last sign is old."""
    now, messages = time.monotonic(), []
    for key, sign in signs.items():
        if seen.get(key, ("", 0.0))[0] != sign:
            seen[key] = sign, now
        elif now - seen[key][1] > _SILENT_S:
            number = key.rpartition("/")[2]
            text = f"process {number} has given no sign of life for {_SILENT_S:g} s: was it killed?"
            messages.append((f"{_FAILED}/{number}", text))
    return messages


def _end_all(error: BaseException) -> None:
    """Print what happened here, let the others know, and go without waiting for them."""
    if isinstance(error, jax.errors.JaxRuntimeError) and (elsewhere := _failed_elsewhere()):
        print(f"error: {elsewhere}", file=sys.stderr, flush=True)
        _go(1)  # a collective broke off because that process had gone
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, SystemExit):  # which has had its say
        traceback.print_exc()
    code = 2 if isinstance(error, InputError) else 1
    reason = _first_line(error) or type(error).__name__
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        reason = f"it ended with the exit code {code}"
    message = f"{_name()} failed: {reason}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_FAILED}/{_index()}", message)
    sys.stdout.flush()
    sys.stderr.flush()
    _go(code)


def _go(code: int) -> None:
    """Exit; process 0, where it stands why, when all others that live have read it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_LEFT}/{_index()}", "", allow_overwrite=True)
        last = time.monotonic() + _LEAVE_S * (_index() == 0)
        count = distributed.global_state.num_processes
        while time.monotonic() < last and len(_client().key_value_dir_get(_LEFT)) < count:
            time.sleep(0.1)
    os._exit(code)


def _failed_elsewhere() -> str | None:
    """What another process said when it failed, which it does before its connections break."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        for _, message in _client().key_value_dir_get(_FAILED):
            return message
    return None


def _client() -> Any:
    """None where the process is alone."""
    return distributed.global_state.client


def _index() -> int:
    """As :func:`jax.process_index`, which would look for devices."""
    return distributed.global_state.process_id or 0


def _name() -> str:
    count = distributed.global_state.num_processes
    return f"process {_index()} of {count} ({socket.gethostname()})"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _short(value: object) -> str:
    text = json.dumps(value)
    return (
        text if len(text) <= 40 else f"{text[:16]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )
