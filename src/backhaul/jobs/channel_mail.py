"""The channel that sends mail, by a server or by this host's own sendmail."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, make_msgid

from backhaul.errors import ConfigurationError
from backhaul.formats.channel_settings import IMPLICIT, STARTTLS, parse_address
from backhaul.jobs.channel_base import Masks, OpenChannel, network_words
from backhaul.jobs.deadline import Deadline
from backhaul.model.verdict import Message
from backhaul.processes.ask import ask_program

# 7 bits and short lines: what the oldest relay passes on unchanged.
_POLICY = SMTP.clone(cte_type="7bit")
_Refused = dict[str, tuple[int, bytes]]


class _Held(smtplib.SMTP):
    deadline: Deadline

    # The one place where its connection comes about; SMTP_SSL calls it before TLS begins.
    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection: socket.socket = super()._get_socket(host, port, timeout)  # type: ignore[misc]
        self.deadline.hold(connection)
        return connection


class _Client(_Held):
    def __init__(self, deadline: Deadline, host: str, port: int) -> None:
        self.deadline = deadline
        super().__init__(host, port, timeout=deadline.patience)


class _TLSClient(smtplib.SMTP_SSL, _Held):
    def __init__(self, deadline: Deadline, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self.deadline = deadline
        super().__init__(host, port, timeout=deadline.patience, context=context)


class Mail(OpenChannel):
    """Mail with the text, and the page beside it where there is one."""

    def _deliver(self, message: Message, masks: Masks) -> None:
        mail = build_mail(message, self.channel.text("from"), self._recipients())
        if sendmail := self.channel.text("sendmail"):
            self._pipe(sendmail, mail, masks)
        else:
            self._send(mail, masks)

    def _recipients(self) -> tuple[str, ...]:
        return tuple(address for address in self.channel.several("to") if isinstance(address, str))

    def _pipe(self, program: str, mail: EmailMessage, masks: Masks) -> None:
        # A program of this host reads lines as this host writes them.
        content = mail.as_bytes(policy=_POLICY.clone(linesep="\n"))
        answer = ask_program([program, "-t", "-oi"], seconds=self.timeout, text=content)
        todo = f"Run it by hand: echo test | {program} -t -oi, and see the mail log of this host."
        if answer.status is None:
            why = f"it took longer than {self.timeout:g} s and was ended"
            raise self._failed(program, why, todo, masks)
        if not answer.status.ok:
            words = answer.words or answer.output.decode(errors="replace").strip()
            why = f"{answer.status}" + (f"; its last words:\n{words}" if words else "")
            raise self._failed(program, why, todo, masks)

    def _send(self, mail: EmailMessage, masks: Masks) -> None:
        host, port = self.channel.text("host"), int(self.channel.number("port"))
        place = f"{host}:{port}"
        password = self._hidden("password", masks)
        user = self.channel.text("user")
        if password and not (password.isascii() and user.isascii()):
            raise ConfigurationError(
                f"password of [notify.{self.name}] can't be sent",
                "it, or the user's name, has other characters than ASCII",
                "Have the mail server take another one.",
            )
        masks.add(f"\0{user}\0{password}" if password else "")
        context = self._context() if self.channel.text("tls") in (IMPLICIT, STARTTLS) else None
        deadline = Deadline(self.timeout)
        try:
            refused = deadline.run(lambda: self._converse(mail, password, context, deadline))
        except smtplib.SMTPRecipientsRefused as error:
            refused = error.recipients
        except smtplib.SMTPAuthenticationError as error:
            todo = f"Check user and password of [notify.{self.name}]."
            raise self._failed(place, _reply(error.smtp_code, error.smtp_error), todo, masks) from None
        except smtplib.SMTPNotSupportedError as error:
            todo = "Check port and tls: less protection than was asked for is never taken instead."
            raise self._failed(place, str(error), todo, masks) from None
        except smtplib.SMTPResponseException as error:
            todo = "See what it says." if error.smtp_code >= 500 else "It may take the message later: see what it says."
            raise self._failed(place, _reply(error.smtp_code, error.smtp_error), todo, masks) from None
        except smtplib.SMTPServerDisconnected:
            todo = 'Check host, port and tls: it may speak TLS from the first byte (tls = "implicit").'
            raise self._failed(place, "it broke the connection off", todo, masks) from None
        except smtplib.SMTPException as error:
            raise self._failed(place, str(error), "Check port, tls and user.", masks) from None
        except (OSError, ValueError) as error:
            raise self._failed(place, *network_words(error, self.timeout), masks) from None
        if refused:
            self._say_refused(place, refused, masks)

    def _converse(
        self, mail: EmailMessage, password: str, context: ssl.SSLContext | None, deadline: Deadline
    ) -> _Refused:
        """Hand the mail over; return who was refused while others were not."""
        client = self._connect(context, deadline)
        try:
            if context is not None and not isinstance(client, _TLSClient):
                client.starttls(context=context)
            if password:
                client.login(self.channel.text("user"), password)
            refused = self._hand_over(client, mail)
            # The mail is theirs now: whatever comes of the farewell, it must not look undelivered.
            with contextlib.suppress(OSError):
                client.putcmd("quit")
            return refused
        finally:
            client.close()

    def _hand_over(self, client: smtplib.SMTP, mail: EmailMessage) -> _Refused:
        sender, *recipients = self._addresses(self.channel.text("from"), *self._recipients())
        if all(address.isascii() for address in (sender, *recipients)):
            # Not send_message, which makes ">From" of the beginning of a line for these.
            return client.sendmail(sender, recipients, mail.as_bytes())
        return client.send_message(mail)

    @staticmethod
    def _addresses(*texts: str) -> list[str]:
        return [found.addr_spec for text in texts if (found := parse_address(text)) is not None]

    def _connect(self, context: ssl.SSLContext | None, deadline: Deadline) -> smtplib.SMTP:
        host, port = self.channel.text("host"), int(self.channel.number("port"))
        if self.channel.text("tls") == IMPLICIT:
            return _TLSClient(deadline, host, port, context)
        return _Client(deadline, host, port)

    def _say_refused(self, place: str, refused: _Refused, masks: Masks) -> None:
        everybody = self._addresses(*self._recipients())
        delivered = [address for address in everybody if address not in refused]
        why = "\n".join(f"{address}: {_reply(*reply)}" for address, reply in refused.items())
        todo = f"Correct `to` of [notify.{self.name}], or have the mail server take them."
        if delivered:
            todo += f" The others have it: {', '.join(delivered)}."
        error = self._failed(place, f"refused {len(refused)} of {len(everybody)} recipients\n{why}", todo, masks)
        error.details |= {"refused": sorted(refused), "delivered": delivered}
        raise error


def build_mail(message: Message, sender: str, recipients: tuple[str, ...]) -> EmailMessage:
    """Return the message as mail.

    The subject must be one line (``clean_message``). ``Auto-Submitted`` is RFC 3834's: no holiday notes come back.
    """
    mail = EmailMessage(policy=_POLICY)
    mail["Subject"] = message.subject
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Date"] = localtime()
    address = parse_address(sender)
    # Never the default, which asks the network for this host's name.
    domain = address.domain if address is not None and address.domain.isascii() else ""
    mail["Message-ID"] = make_msgid(domain=domain or "backhaul.invalid")
    mail["Auto-Submitted"] = "auto-generated"
    mail["X-Backhaul-State"] = message.state
    mail.set_content(message.text if message.text.endswith("\n") else message.text + "\n")
    if message.html:
        mail.add_alternative(message.html, subtype="html")
    return mail


def _reply(code: int, words: bytes | str) -> str:
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    return f"it answered {code} {' '.join(text.split())}"
