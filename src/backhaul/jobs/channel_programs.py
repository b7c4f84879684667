"""Channels that hand a message to something of this host: a program, or the library Apprise."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import warnings
from types import ModuleType
from typing import Any

from backhaul.errors import ConfigurationError
from backhaul.jobs.channel_base import Masks, OpenChannel
from backhaul.jobs.deadline import Deadline
from backhaul.model import verdict
from backhaul.model.channel import Channel
from backhaul.model.verdict import Message
from backhaul.processes.ask import ask_program

_LAST_LINES = 5


class Program(OpenChannel):
    """A program that does with the message what it likes; its exit status says whether it did."""

    def _deliver(self, message: Message, masks: Masks) -> None:
        command = tuple(word for word in self.channel.several("command") if isinstance(word, str))
        environment = {
            **os.environ,
            "BACKHAUL_SUBJECT": message.subject,
            "BACKHAUL_STATE": message.state,
            "BACKHAUL_JOB": message.job,
            "BACKHAUL_FAILURE": "true" if message.failure else "false",
        }
        text = message.text.encode()
        answer = ask_program(command, seconds=self.timeout, text=text, environment=environment)
        if answer.status is None:
            why = f"it took longer than {self.timeout:g} s and was ended"
            raise self._failed(command[0], why, "It must be done within timeout, and read no terminal.", masks)
        if not answer.status.ok:
            words = answer.words or "\n".join(answer.output.decode(errors="replace").splitlines()[-_LAST_LINES:])
            why = f"{answer.status}" + (f"; its last words:\n{words}" if words else "")
            raise self._failed(command[0], why, "See what it says; run it by hand, as the same account.", masks)


class Apprise(OpenChannel):
    """Any service that Apprise knows; one URL after the other, so that each one's fate is known."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        try:
            # Its plug-ins are loaded with the first URL. That takes a while, and some import what Python is about to
            # drop: neither is news.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._library: ModuleType = importlib.import_module("apprise")
                self._library.Apprise.instantiate("json://localhost")
        except ImportError as error:
            raise ConfigurationError(
                f"[notify.{channel.name}] can't be used",
                f"the library Apprise is not installed ({error})",
                "Install it: pip install 'backhaul[apprise]'",
            ) from error

    def _deliver(self, message: Message, masks: Masks) -> None:
        urls = [masks.add(masks.add_url(self._get(url, "url", masks))) for url in self.channel.several("url")]
        for url in urls:
            # What stands where others have a host is a token for some services.
            masks.add(url.partition("://")[2].partition("/")[0])
        deadline = Deadline(self.timeout)
        done: list[str] = []
        failed: list[tuple[str, str]] = []
        try:
            deadline.run(lambda: self._notify(urls, message, deadline, done, failed))
        except TimeoutError:
            failed.append((_service(urls[min(len(done) + len(failed), len(urls) - 1)]), self._too_late()))
        if failed:
            why = "\n".join(f"{service}: {words}" if words else service for service, words in failed)
            todo = f"Check the URLs of [notify.{self.name}]: apprise -vv URL says more."
            if done:
                todo += f" Delivered were: {', '.join(done)}."
            error = self._failed(", ".join(service for service, _ in failed), why, todo, masks)
            error.details |= {"refused": [service for service, _ in failed], "delivered": list(done)}
            raise error

    def _asset(self) -> Any:
        """Return settings by which Apprise does its work on the thread that asks.

        For a time limit of its own it would take a thread that the end of this process waits for.
        """
        try:
            return self._library.AppriseAsset(service_timeout=0)
        except (AttributeError, TypeError):  # before 2.0, which knows no such limit
            return self._library.AppriseAsset()

    def _too_late(self) -> str:
        return f"it was not done within {self.timeout:g} s"

    def _notify(
        self,
        urls: list[str],
        message: Message,
        deadline: Deadline,
        done: list[str],
        failed: list[tuple[str, str]],
    ) -> None:
        level = {verdict.OK: "success", verdict.HELD: "info", verdict.RUNNING: "info"}
        heard = _Heard()
        logger = logging.getLogger("apprise")
        logger.addHandler(heard)
        try:
            for url in urls:
                if deadline.over:
                    return
                heard.lines.clear()
                try:
                    service = self._library.Apprise(asset=self._asset())
                    if not service.add(url):
                        failed.append((_service(url), "Apprise doesn't know what to do with this URL"))
                        continue
                    taken = service.notify(
                        body=message.text or message.subject,
                        title=message.subject,
                        notify_type=level.get(message.state, "failure" if message.failure else "warning"),
                        body_format="text",
                    )
                except Exception as error:  # noqa: BLE001 - its plug-ins are by many hands, and the others go on
                    failed.append((_service(url), f"{type(error).__name__} in Apprise"))
                    continue
                if taken:
                    done.append(_service(url))
                else:
                    failed.append((_service(url), "; ".join(heard.lines[-_LAST_LINES:])))
        finally:
            logger.removeHandler(heard)


class _Heard(logging.Handler):
    """What Apprise says on this thread of why it failed. With a handler there, nothing of it is printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.lines.append(record.getMessage())


def _service(url: str) -> str:
    return f"{url.partition('://')[0]}://"
