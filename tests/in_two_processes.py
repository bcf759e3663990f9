"""Runs the whole suite in two processes, so that a newcomer waits half as long.

pytest forks once, after it has collected the tests. Each of the two processes takes the next
file of tests from a common list until there is none left; the second one sends its reports to
the first, which prints and counts them all. A few tests, `-x` or a debugger run in one process.
"""
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
from _pytest.runner import runtestprotocol

# What the second process says when it has run its last test.
NO_MORE = "no more"

# Below this number of tests, a second process does not pay.
LEAST = 400

# The files that take longest come first, so that both processes end at about the same time.
LONGEST = (
    "test_notebooks", "test_all_tasks", "test_distributed", "test_scripts", "test_released",
    "test_image_shapes", "test_fuzz", "test_strangers_sets", "test_ranges", "test_not_finite",
    "test_bad_input", "test_bench", "test_inception",
)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in two processes; None leaves them to pytest's own loop."""
    option = session.config.option
    is_plain = not (option.usepdb or option.maxfail or option.collectonly)
    can_fork = hasattr(os, "fork") and (os.cpu_count() or 1) > 1
    if session.testsfailed or len(session.items) < LEAST or not (is_plain and can_fork):
        return None

    files = by_file(session.items)
    taken = multiprocessing.get_context("fork").Value("i", 0)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        run_as_second(session, files, taken, sender)
    sender.close()

    is_over = False                             # for the second process
    for item, following in turns(files, taken):
        for report in runtestprotocol(item, log=False, nextitem=following):
            item.ihook.pytest_runtest_logreport(report=report)
        while not is_over and receiver.poll():
            is_over = print_report(session, receiver)
    while not is_over:
        is_over = print_report(session, receiver)
    os.waitpid(child, 0)
    return True


def by_file(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Return the tests, file by file; the longest files first."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path.stem, []).append(item)

    def place(name: str) -> int:
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    return [files[name] for name in sorted(files, key=place)]


def turns(files: list, taken) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Yield this process's tests, each with the one that follows it here.

    Why the one that follows: pytest tears down the fixtures that it does not need.
    """
    def take() -> list[pytest.Item]:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        return files[number] if number < len(files) else []

    current = take()
    while current:
        following = take()
        yield from zip(current, [*current[1:], *(following[:1] or [None])])
        current = following


def run_as_second(session: pytest.Session, files: list, taken, sender: Connection) -> None:
    """Run tests and send their reports; the process ends here."""
    try:
        # What the tests print goes to files of this process's own.
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        for item, following in turns(files, taken):
            for report in runtestprotocol(item, log=False, nextitem=following):
                values = session.config.hook.pytest_report_to_serializable(
                    config=session.config, report=report
                )
                sender.send(values)
        sender.send(NO_MORE)
    finally:
        os._exit(0)


def print_report(session: pytest.Session, receiver: Connection) -> bool:
    """Print and count one report of the second process; True if there are no more.

    Raises session.Failed if that process ended without saying so: tests are missing then.
    """
    try:
        values = receiver.recv()
    except EOFError:
        raise session.Failed("the second process of the tests died; tests are missing") from None
    if values == NO_MORE:
        return True
    report = session.config.hook.pytest_report_from_serializable(
        config=session.config, data=values
    )
    session.config.hook.pytest_runtest_logreport(report=report)
    return False
