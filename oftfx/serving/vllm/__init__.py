"""OFT adapters as vLLM's "LoRA requests": several in one batch, beside the base model and LoRA adapters.

vLLM finds `register` by its entry point ``vllm.general_plugins`` and calls it in every process of a server. Nothing is
to be imported: with oftfx installed, ``--enable-lora --lora-modules name=directory`` takes directories of OFT adapters
as well. ``OFTFX_VLLM_BLOCK_SIZE`` says for which sizes of blocks there is room; 32 unless it is set.
"""

from __future__ import annotations

import logging
import os

from oftfx.serving.vllm.contract import FITS, UNTESTED, faults
from oftfx.serving.vllm.hooks import install, install_refusal

_done = False


def register() -> None:
    """Let vLLM take OFT adapters; a vLLM that this does not fit is left as it is, but for a refusal of such adapters.

    Nothing is done twice, and nothing before the first call.
    """
    global _done
    if _done:
        return
    _done = True
    found = [] if os.environ.get(UNTESTED) == "1" else faults()
    if not found:
        install()
        return
    why = f"OFT adapters are not served here: {found[0]}. This oftfx is for vLLM {FITS}"
    logging.getLogger("vllm.oftfx").warning(why)
    install_refusal(why)
