"""The small pretrained Mamba-2 language model that ships inside the package.

It lets every example, test and first run work offline on a real pretrained model. Importing this
module loads neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["embedded_model_path"]


def embedded_model_path() -> Path:
    """Return the directory of the embedded model, in transformers' own format.

    The directory holds ``config.json``, ``model.safetensors``, ``tokenizer.json``,
    ``tokenizer_config.json``, ``generation_config.json`` and the model card ``README.md``. Both
    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` accept it.

    Returns:
        The absolute path of the model directory.

    Raises:
        RuntimeError: The model files are missing from the installation.
    """
    path = Path(__file__).resolve().parent / "mamba2-docs"
    if not (path / "model.safetensors").is_file():
        raise RuntimeError(
            f"embedded model: expected model.safetensors in {path}, found none; reinstall "
            "prodial-kernels from a complete wheel or sdist"
        )
    return path
