"""ProDiaL as a method of PEFT: ``import prodial_kernels.peft`` and PEFT knows ``PRODIAL``.

``get_peft_model``, ``PeftModel.from_pretrained``, ``AutoPeftModelForCausalLM``, transformers'
``model.load_adapter`` and ``pipeline(model=DIRECTORY)``, ``Trainer`` and TRL's trainers then take
it as they take LoRA. Importing this package loads peft, and is what tells it of the name: a
program that loads an adapter has to import it too.

PEFT's files are not touched: the name is added to the running process (:mod:`.register`).
"""

import prodial_kernels.peft.available  # noqa: F401  first: it says what to install
from prodial_kernels.peft.config import ProdialPeftConfig
from prodial_kernels.peft.convert import load_peft, to_peft
from prodial_kernels.peft.hotswap import hotswap_adapter
from prodial_kernels.peft.layer import ProdialPeftLinear
from prodial_kernels.peft.register import register
from prodial_kernels.peft.tuner import ProdialTuner

register(ProdialPeftConfig, ProdialTuner)

__all__ = [
    "ProdialPeftConfig",
    "ProdialPeftLinear",
    "ProdialTuner",
    "hotswap_adapter",
    "load_peft",
    "to_peft",
]
