"""Random CLIPs, open_clip as their reference, a server on loopback."""

import re
import socketserver
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler

from torch import Tensor, nn

from benchmarks.common import CONFIGS, TINY_RESNET, TINY_VIT, random_state_dict  # noqa: F401
from clip import download
from clip.model import EXTRA_KEYS


def open_clip_model(state: dict[str, Tensor]) -> nn.Module:
    """The same weights in open_clip's model, in float32."""
    from open_clip.model import build_model_from_openai_state_dict

    state = {key: value for key, value in state.items() if key not in EXTRA_KEYS}
    model = build_model_from_openai_state_dict(dict(state)).float()
    model.load_state_dict(state)  # once more, since it rounds what it builds from to fp16
    return model.eval()


class Server:
    """Serves one file at every path on loopback, faithfully or not; a context manager.

    While it runs it is one of the hosts that downloads may come from.

    Attributes:
        content: the file.
        ranges: whether Range headers are honoured.
        shift: added to where a continued answer starts, a server's mistake.
        stop_after: close the connection after so many bytes of the body.
        delay: seconds to wait before an answer.
        stall: seconds to wait before it is closed.
        chunked: send the body as one chunk, without its length.
        status: answer with this error instead.
        location: answer with a redirection to this address instead.
        tls: a context to speak TLS with; plain HTTP without.
        requests: the Range header of each request so far, None where it had none.
    """

    def __init__(self, content: bytes, tls: ssl.SSLContext | None = None):
        self.content, self.tls, self.location = content, tls, None
        self.ranges, self.shift, self.stop_after, self.status = True, 0, None, None
        self.delay, self.stall, self.chunked = 0, 0, False
        self.requests: list[str | None] = []

    def __enter__(self) -> "Server":
        class Handler(BaseHTTPRequestHandler):
            do_GET = lambda handler: self._answer(handler)  # noqa: E731
            log_message = lambda *_: None  # noqa: E731

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        if self.tls:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # a client that hangs up
        scheme = "https" if self.tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        download.ORIGINS.add(self.url)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        download.ORIGINS.discard(self.url)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.requests.append(asked)
        time.sleep(self.delay)
        if self.status:
            return handler.send_error(self.status)
        if self.location:
            handler.send_response(302)
            handler.send_header("Location", self.location)
            return handler.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else None
        if start is not None and start >= len(self.content):
            return handler.send_error(416)
        body = self.content
        if start is None:
            handler.send_response(200)
        else:
            start += self.shift
            body = body[start:]
            handler.send_response(206)
            last = len(self.content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{last}/{len(self.content)}")
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n" % len(body) + body[: self.stop_after])
            if self.stop_after is None:
                handler.wfile.write(b"\r\n0\r\n\r\n")
        else:
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: self.stop_after])
        time.sleep(self.stall)
        return None
