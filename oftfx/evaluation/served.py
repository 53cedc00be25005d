"""Running servers: what they say to a prompt, by the two protocols that inference servers have."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from oftfx.errors import OftfxError
from oftfx.serving.copied.runtime.contract import ADAPTER_INDEX
from oftfx.typed_json import parsed

LARGEST = 2**31
"""Bytes of an answer; more is no answer to what is asked here."""


class ServerError(OftfxError, RuntimeError):
    """A server is not there, does not know the model or the adapter, or refuses a request."""


class Served(ABC):
    """A model of a running server.

    Args:
        url: ``http://host:port``.
        model: its name there; empty: the only one.
        adapter: the name by which a request chooses the adapter; empty: none.
        seconds: that an answer may take.
    """

    protocol: ClassVar[str]

    def __init__(self, url: str, model: str, adapter: str, seconds: float) -> None:
        self.url, self.adapter, self.seconds = url.rstrip("/"), adapter, seconds
        self.model = model or self._only(self.models())

    @abstractmethod
    def models(self) -> list[str]:
        """Names of the models that it has."""

    def _only(self, names: list[str]) -> str:
        if len(names) != 1:
            raise ServerError(f"{self.url} has {len(names)} models ({', '.join(names) or 'none'}); name one: --model")
        return names[0]


class OpenAIServer(Served):
    """The OpenAI API, as vLLM has it: an adapter is a model of its own name; tokens come back."""

    protocol = "openai"

    def models(self) -> list[str]:
        """Those that are no adapter of another."""
        found = call(f"{self.url}/v1/models", None, self.seconds)
        with understood(self.url):
            return [_text(m["id"]) for m in found["data"] if not m.get("parent")]

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens after a prompt of token ids.

        Raises:
            ServerError: it refuses the request, or does not say the ids of its tokens.
        """
        body = {"model": self.adapter or self.model, "prompt": list(prompt), "max_tokens": count, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = call(f"{self.url}/v1/completions", body, self.seconds)
        with understood(self.url):
            tokens = answer["choices"][0].get("token_ids")
            if tokens is None:
                raise ServerError(f"{self.url}: the answer has no token ids, without which nothing can be compared")
            return [int(t) for t in tokens]


class InferenceServer(Served):
    """The Open Inference Protocol, as Triton and MLServer have it: logits come back; see `oftfx.serving`."""

    protocol = "inference"

    def models(self) -> list[str]:
        """By Triton's repository extension; MLServer has it too."""
        try:
            found = call(f"{self.url}/v2/repository/index", {}, self.seconds)
        except ServerError:
            return []
        with understood(self.url):
            return sorted({_text(m["name"]) for m in found})

    def logits(self, ids: Tensor) -> Tensor:
        """``(1, n, vocabulary)`` of token ids ``(1, n)``, from one request.

        Raises:
            ServerError: it refuses the request, or the model takes or gives something else.
        """
        about = call(f"{self.url}/v2/models/{self.model}", None, self.seconds)
        with understood(self.url):
            body = self._asking(about, ids)
        answer = call(f"{self.url}/v2/models/{self.model}/infer", body, self.seconds)
        with understood(self.url):
            for output in answer["outputs"]:
                if output["name"] == "logits":
                    found = torch.tensor(output["data"], dtype=torch.float32).reshape(output["shape"])
                    if found.shape[:2] != ids.shape or found.dim() != 3:
                        raise ServerError(
                            f"{self.url}: logits of shape {list(found.shape)} for {ids.shape[1]} tokens; expected "
                            f"[1, {ids.shape[1]}, vocabulary]"
                        )
                    return found
        raise ServerError(f"{self.url}: model {self.model!r} gives no 'logits'")

    def _asking(self, about: Any, ids: Tensor) -> dict[str, Any]:
        """The request, by what the server says that its model takes."""
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])}
        inputs = []
        for one in about.get("inputs", []):
            name, shape = one["name"], [int(n) for n in one["shape"]]
            if name in known:
                tensor = known[name].reshape(1, -1)
            elif name.startswith("past_key_values."):
                inputs.append(
                    {"name": name, "datatype": one["datatype"], "shape": [1, shape[1], 0, shape[3]], "data": []}
                )
                continue
            elif name == ADAPTER_INDEX:
                continue  # the server makes it of the request's parameter
            else:
                raise ServerError(f"{self.url}: model {self.model!r} takes {name!r}, which no text has")
            inputs.append(
                {"name": name, "datatype": "INT64", "shape": list(tensor.shape), "data": tensor.flatten().tolist()}
            )
        body: dict[str, Any] = {"inputs": inputs, "outputs": [{"name": "logits"}]}
        if self.adapter:
            body["parameters"] = {"adapter": self.adapter}
        return body


@contextmanager
def understood(url: str) -> Iterator[None]:
    """JSON that is not what the protocol says becomes a `ServerError`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, ServerError):
            raise
        what = f"{type(error).__name__}: {error}"[:200]
        raise ServerError(f"{url}: its answer is not what the protocol says ({what})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def connect(url: str, *, model: str = "", adapter: str = "", seconds: float = 300.0) -> OpenAIServer | InferenceServer:
    """The server behind a URL, by the protocol that answers.

    Raises:
        ServerError: nothing answers there, or neither protocol.
    """
    url = url.rstrip("/")
    reasons = []
    for path, kind in (("/v1/models", OpenAIServer), ("/v2", InferenceServer)):
        try:
            call(url + path, None, min(seconds, 10.0))
        except ServerError as error:
            reasons.append(str(error))
            continue
        return kind(url, model, adapter, seconds)  # type: ignore[abstract]
    raise ServerError(f"{url} speaks neither the OpenAI API nor the Open Inference Protocol: {'; '.join(reasons)}")


def call(url: str, body: Any, seconds: float) -> Any:
    """JSON from a server; ``body`` as JSON to it, or None to ask only.

    Raises:
        ServerError: no answer, or one that is no success.
    """
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            text = response.read(LARGEST + 1)
            if len(text) > LARGEST:
                raise ServerError(f"{url}: the answer has more than {LARGEST:,} bytes")
    except urllib.error.HTTPError as error:
        said = error.read(4000).decode(errors="replace").strip()
        raise ServerError(f"{url}: {error.code}: {said[:400] or error.reason}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ServerError(f"{url}: no answer: {getattr(error, 'reason', error)}") from None
    try:
        return parsed(text) if text else {}
    except ValueError:
        raise ServerError(f"{url}: the answer is not JSON") from None
