"""What botocore is given to send: it may have to send it again, to another region."""

from __future__ import annotations

import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.compat import HTTPHeaders

from backhaul.stores.body import PartBody
from backhaul.stores.s3.store import sendable

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [0, 1, 64 << 10, (64 << 10) + 1])
@pytest.mark.parametrize("paced", [False, True])
def test_a_body_can_be_sent_again_after_a_redirect(size: int, paced: bool) -> None:
    content = b"x" * size
    body = PartBody(content)
    if paced:
        body.pace(lambda count: None, lambda count: None, 1000)
    request = AWSPreparedRequest("PUT", "http://127.0.0.1/b/k", HTTPHeaders(), sendable(body), stream_output=False)
    request.reset_stream()
    assert len(sendable(content)) == len(sendable(memoryview(content))) == size


def test_little_is_no_reader_and_not_the_memory_itself() -> None:
    memory = bytearray(b"abc")
    sent = sendable(PartBody(memory))
    assert not hasattr(sent, "read")
    memory[:] = b"xyz"
    assert bytes(sent) == b"abc"
