"""Random CLIPs, open_clip as their reference, a server on loopback."""

import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler

import torch
from torch import Tensor, nn

from clip import CLIP
from clip.model import EXTRA_KEYS

SIZES = {  # D, image side, layers and width of the image tower, patch side, width of the text tower
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": (512, 224, 12, 768, 32, 512),
    "ViT-B/16": (512, 224, 12, 768, 16, 512),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768),
}
KEYS = (
    "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size",
    "transformer_width",
)  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "transformer_layers": 12}
CONFIGS = {name: dict(zip(KEYS, sizes, strict=True)) | TEXT for name, sizes in SIZES.items()}

TINY_VIT = {
    "embed_dim": 64,
    "image_resolution": 32,
    "vision_layers": 4,
    "vision_width": 128,
    "vision_patch_size": 8,
    "context_length": 16,
    "vocab_size": 514,
    "transformer_width": 64,
    "transformer_layers": 2,
}
TINY_RESNET = {
    **TINY_VIT,
    "image_resolution": 64,
    "vision_layers": (1, 2, 1, 1),
    "vision_width": 8,
    "vision_patch_size": None,
}


def random_state_dict(name_or_config: str | dict, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights of a CLIP in OpenAI's format, none of them at its neutral value.

    Args:
        name_or_config: A key of CONFIGS, or the arguments of `CLIP`.
        seed: The global generator is not touched.
    """
    config = CONFIGS.get(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        shapes = CLIP(**config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in shapes.items():
        name = key.rpartition(".")[2]
        noise = torch.randn(value.shape, generator=generator)
        if key == "logit_scale":
            state[key] = torch.tensor(100.0).log()
        elif name == "num_batches_tracked":
            state[key] = torch.tensor(seed)
        elif name == "running_var":
            state[key] = 0.5 + noise.abs()
        elif name in ("bias", "in_proj_bias", "running_mean"):
            state[key] = 0.1 * noise
        elif value.dim() == 1 and name == "weight":  # of a normalization
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = noise * (value[0].numel() ** -0.5 if value.dim() > 1 else 0.1)
    state["input_resolution"] = torch.tensor(config["image_resolution"])
    state["context_length"] = torch.tensor(config["context_length"])
    state["vocab_size"] = torch.tensor(config["vocab_size"])
    return state


def open_clip_model(state: dict[str, Tensor]) -> nn.Module:
    """The same weights in open_clip's model, in float32."""
    from open_clip.model import build_model_from_openai_state_dict

    state = {key: value for key, value in state.items() if key not in EXTRA_KEYS}
    model = build_model_from_openai_state_dict(dict(state)).float()
    model.load_state_dict(state)  # once more, since it rounds what it builds from to fp16
    return model.eval()


def random_images(model, count=3, seed=1):
    """Normalized images of the model's input size."""
    side = model.visual.input_resolution
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_tokens(model, count=4, seed=2):
    """Texts of different lengths: start, random tokens, end, zeros."""
    generator = torch.Generator().manual_seed(seed)
    start, end = model.vocab_size - 2, model.vocab_size - 1
    tokens = torch.randint(start, (count, model.context_length), generator=generator)
    tokens[:, 0] = start
    for row, length in zip(tokens, range(3, 3 + 2 * count, 2), strict=True):
        row[length - 1] = end
        row[length:] = 0
    return tokens


def relative_error(ours, theirs):
    """The largest error of a row, as a share of the row's length."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


class Server:
    """Serves one file at every path on loopback, faithfully or not; a context manager.

    Attributes:
        content: The file.
        stop_after: Bytes after which the first, second, ... answer ends, None for all of them; the
            last one holds for the answers that follow.
        stall: Seconds to wait before an answer ends.
        chunked: Send the file as one chunk, without its length.
        status: Answer with this error instead.
        requests: Number of requests so far.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.status, self.requests = content, None, 0
        self.stop_after, self.stall, self.chunked = [None], 0, False

    def __enter__(self) -> "Server":
        class Handler(BaseHTTPRequestHandler):
            do_GET = lambda handler: self._answer(handler)  # noqa: E731
            log_message = lambda *_: None  # noqa: E731

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        stop = self.stop_after[min(self.requests, len(self.stop_after) - 1)]
        self.requests += 1
        if self.status:
            return handler.send_error(self.status)
        handler.send_response(200)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n" % len(self.content) + self.content[:stop])
            if stop is None:
                handler.wfile.write(b"\r\n0\r\n\r\n")
        else:
            handler.send_header("Content-Length", str(len(self.content)))
            handler.end_headers()
            handler.wfile.write(self.content[:stop])
        time.sleep(self.stall)
        return None
