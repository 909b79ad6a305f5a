"""Tasks: what a row becomes, which model reads it, how an answer is judged and said. Each is a section of a recipe."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from attunement.errors import AttunementError, nearest
from attunement.train.conversation import IGNORED, conversation
from attunement.train.data import check_text, label_ids, label_names, numbers
from attunement.train.packing import Collator, check_packed, pack
from attunement.train.section import Section
from attunement.train.vocabulary import make_room, with_rows
from attunement.train.words import near

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel


class Base(Section):
    """The pretrained model that is adapted; it is never changed and never saved again."""

    path: str
    """A folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base; `auto` is what its files hold. Adapters are float32 over all of these."""
    quantise: Literal["8bit", "nf4"] | None = None
    """Load the base in 8 or 4 bits through bitsandbytes (extra `quantised`)."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained`."""
        options: dict[str, Any] = {"revision": self.revision, "dtype": self.dtype}
        if self.quantise:
            from transformers import BitsAndBytesConfig

            small = {"load_in_8bit": True} if self.quantise == "8bit" else {"load_in_4bit": True}
            kind = {} if self.quantise == "8bit" else {"bnb_4bit_quant_type": "nf4"}
            options["quantization_config"] = BitsAndBytesConfig(**small, **kind)
        return options

    def load(self, what: Any, **options: Any) -> Any:
        """`what.from_pretrained(path)`, a failure of which is one sentence."""
        self.check("model.path")
        try:
            return what(self.path, **options)
        except (OSError, ValueError, KeyError) as error:
            cause = str(error).strip().split("\n")[0]
            if Path(self.path).is_dir() and not list(Path(self.path).glob("*token*")) and "okenizer" in cause:
                cause = "it holds no tokenizer; save the model's own there with tokenizer.save_pretrained"
            raise AttunementError(f"model.path: {near(self.path)!r} cannot be loaded: {cause}") from error

    def check(self, where: str) -> None:
        """Refuse a path that can be seen to hold no model: what is neither a folder here nor shaped like a hub id."""
        path, shown = Path(self.path).expanduser(), near(self.path)
        if path.is_dir():
            if not any((path / name).exists() for name in ("config.json", "preprocessor_config.json")):
                hint = f"; a run is opened with `predict {shown}`" if (path / "recipe.yaml").exists() else ""
                raise AttunementError(f"{where}: the folder {shown!r} holds no model: it has no config.json{hint}")
        elif path.exists():
            raise AttunementError(f"{where}: {shown!r} is a file; expected the folder of a model or a hub id")
        elif self.path.startswith(("/", ".", "~")) or self.path.endswith("/") or self.path.count("/") > 1:
            raise AttunementError(f"{where}: there is no folder {shown!r}")


class Task(Section):
    """What every task gives; `roles` are the columns it reads, with whether they must be there."""

    roles: ClassVar[dict[str, bool]] = {}
    metric: ClassVar[str] = "loss"
    """The metric by which the best checkpoint is chosen."""
    greater_is_better: ClassVar[bool] = False
    lazy: ClassVar[bool] = False
    """Whether rows become inputs only when a batch is asked for."""

    def resolved(self, train: Dataset, where: str) -> Task:
        """The task with what only the training rows can say: its labels."""
        return self

    def processor(self, base: Base) -> Any:
        """The tokenizer or image processor of the base."""
        from transformers import AutoTokenizer

        tokenizer = base.load(AutoTokenizer.from_pretrained, revision=base.revision)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # masked wherever it stands
        if tokenizer.pad_token is None:
            raise AttunementError(
                f"model.path: the tokenizer of {near(base.path)!r} has no token for padding; give it one and save it: "
                "tokenizer.pad_token = ..., tokenizer.save_pretrained(folder)"
            )
        return tokenizer

    @abstractmethod
    def model(self, base: Base, processor: Any) -> PreTrainedModel:
        """The base with the head that the task needs, freshly initialised."""

    def recipe(self, model: Any, processor: Any, method: Any, on: str | None) -> tuple[Any, str | None]:
        """What `at.adapt` takes: the method and places that the recipe names, and what the task has to train beside."""
        return method, on

    def for_training(self, rows: Any, model: Any, collate: Any) -> Any:
        """What a trainer reads of the encoded training rows. Raises `AttunementError` for a model that cannot."""
        return rows

    def fits(self, rows: Any, model: Any, processor: Any, where: str) -> None:
        """Have the longest row read once, where it is longer than the model or its tokenizer says that it reads.

        Raises `AttunementError` for a model that has no positions for it; many models read on.
        """
        if "length" not in rows.column_names or not len(rows):
            return
        said = {getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None)}
        said |= {processor.model_max_length}
        lengths = list(rows["length"])
        longest = max(range(len(rows)), key=lengths.__getitem__)
        limits = sorted((n for n in said if n and n < lengths[longest]), reverse=True)
        if not limits or _reads(model, rows[longest], lengths[longest]):
            return
        known = next((n for n in limits if _reads(model, rows[longest], n)), None)
        if known is not None:
            raise AttunementError(
                f"task.max_length: {where} has a row of {lengths[longest]} tokens and the model reads at most {known}; "
                f"expected task.max_length={known} or less"
            )

    @abstractmethod
    def encode(self, table: Dataset, processor: Any, where: str) -> Any:
        """Rows as model inputs, with labels where they have them; raises `AttunementError` for one it cannot use."""

    def collator(self, processor: Any) -> Any:
        """Rows to a batch, padded to its longest."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def for_metrics(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What evaluation keeps of the logits of a batch."""
        return logits[0] if isinstance(logits, tuple) else logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The figures of an evaluation."""
        return {}

    def answers(self, model: PreTrainedModel, rows: Dataset, processor: Any, batch_size: int) -> list[dict[str, Any]]:
        """One plain dictionary per row: what the model says of it."""
        logits = _logits(model, self.encode(rows, processor, "rows"), self.collator(processor), batch_size)
        return [self.answer(row) for row in logits]

    def answer(self, logits: torch.Tensor) -> dict[str, Any]:
        """Logits (labels,) as a plain dictionary."""
        return {"values": logits.tolist()}


class _Text(Task):
    pooling: Literal["model", "mean", "cls"] = "model"
    """How a text becomes one vector: `model` is the model's own classification head; `mean` and `cls` are the mean or
    the first of the last hidden states, of length one, times `scale`, under a linear head. Sentence encoders want
    `mean`."""
    scale: PositiveFloat = 20.0
    """The factor on the pooled feature of length one: an inverse temperature."""
    max_length: PositiveInt = 256
    """Tokens after which a text is cut."""

    roles: ClassVar[dict[str, bool]] = {"text": True, "text_pair": False, "label": True}

    def _model(self, base: Base, processor: Any, **labels: Any) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        from attunement.train import pooling

        if self.pooling == "model":
            model = base.load(AutoModelForSequenceClassification.from_pretrained, **base.options(), **labels)
        else:
            make = pooling.PooledForSequenceClassification.from_backbone
            model = base.load(make, pooling=self.pooling, scale=self.scale, **base.options(), **labels)
        model.config.pad_token_id = processor.pad_token_id
        return model

    def _tokens(self, table: Dataset, processor: Any, where: str) -> Dataset:
        check_text(table, "text", where)
        pairs = [table["text"]]
        if "text_pair" in table.column_names:
            check_text(table, "text_pair", where)
            pairs.append(table["text_pair"])
        encoded = processor(*[list(texts) for texts in pairs], truncation=True, max_length=self.max_length)
        return _dataset(**encoded)


class Classification(_Text):
    """Texts, or pairs of texts, into one of several classes."""

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...] | None = None
    """The classes in their order; without it those of the training rows, sorted."""

    metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True

    def resolved(self, train: Dataset, where: str) -> Classification:
        return self.model_copy(update={"labels": tuple(label_names(train, self.labels, where))})

    def model(self, base: Base, processor: Any) -> PreTrainedModel:
        return self._model(base, processor, **_label_config(self.labels))

    def encode(self, table: Dataset, processor: Any, where: str) -> Dataset:
        encoded = self._tokens(table, processor, where)
        if "label" not in table.column_names:
            return encoded
        return encoded.add_column("labels", label_ids(table, self.labels or (), where))

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return _classified(prediction)

    def answer(self, logits: torch.Tensor) -> dict[str, Any]:
        return _named(logits, self.labels or ())


class Regression(_Text):
    """Texts, or pairs of texts, to a number."""

    kind: Literal["regression"] = "regression"

    metric: ClassVar[str] = "pearson"
    greater_is_better: ClassVar[bool] = True

    def model(self, base: Base, processor: Any) -> PreTrainedModel:
        model = self._model(base, processor, num_labels=1)
        model.config.problem_type = "regression"
        return model

    def encode(self, table: Dataset, processor: Any, where: str) -> Dataset:
        encoded = self._tokens(table, processor, where)
        if "label" not in table.column_names:
            return encoded
        values = []
        for number, value in zip(numbers(table), table["label"][:], strict=True):
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                raise AttunementError(f"{where}: row {number} has no number for a label, it is {value!r}") from None
            if not np.isfinite(values[-1]):
                raise AttunementError(f"{where}: row {number} has the label {value!r}, which is not finite")
        return encoded.add_column("labels", values)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from scipy.stats import rankdata

        got, wanted = np.asarray(prediction.predictions).reshape(-1), np.asarray(prediction.label_ids).reshape(-1)
        flat = got.std() == 0 or wanted.std() == 0  # no correlation is defined

        def correlation(a: np.ndarray, b: np.ndarray) -> float:
            return 0.0 if flat else float(np.asarray(np.corrcoef(a, b))[0, 1])

        return {
            "pearson": correlation(got, wanted),
            "spearman": correlation(rankdata(got), rankdata(wanted)),
            "rmse": float(np.sqrt(np.mean((got - wanted) ** 2))),
        }

    def answer(self, logits: torch.Tensor) -> dict[str, Any]:
        return {"value": logits.item()}


class CausalLM(Task):
    """Text generation, learned on completions only: the tokens of a prompt give no loss."""

    kind: Literal["causal-lm"] = "causal-lm"
    max_length: PositiveInt = 1024
    """Tokens of prompt and completion together; a longer prompt loses its beginning, a longer completion its end."""
    max_new_tokens: PositiveInt = 128
    """Tokens that `attune predict` writes at most."""
    packing: bool = False
    """Whether training fills windows of `max_length` tokens with several rows each, which see nothing of one another:
    no time goes into padding. A step then reads `per_device_train_batch_size` windows."""
    new_tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary. Their embeddings, and their rows of an untied head, are learned and saved with the
    adapter beside what it says."""
    chat: bool | None = None
    """Whether `attune predict` asks a text as what a user says, under the chat template; without it, where the training
    rows are `messages`."""
    end: str | None = None
    """The token that ends a completion, for a tokenizer that names none (or another): one of its vocabulary."""

    roles: ClassVar[dict[str, bool]] = {"prompt": False, "completion": False, "messages": False, "text": False}

    def resolved(self, train: Dataset, where: str) -> CausalLM:
        found = True if "messages" in train.column_names else None
        return self if self.chat is not None else self.model_copy(update={"chat": found})

    def processor(self, base: Base) -> Any:
        from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoTokenizer

        config = base.load(AutoConfig.from_pretrained, revision=base.revision)
        decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes:
            raise AttunementError(
                f"task.kind: {near(base.path)!r} ({config.model_type}) is an encoder, whose tokens see the ones that "
                "follow; causal-lm needs a model that was trained to continue a text, such as a GPT or a Llama"
            )
        if self.end is None:
            tokenizer = super().processor(base)
            tokenizer.add_tokens(list(self.new_tokens))
        else:
            tokenizer = base.load(AutoTokenizer.from_pretrained, revision=base.revision)
            tokenizer.add_tokens(list(self.new_tokens))
            if self.end not in tokenizer.get_vocab():
                raise AttunementError(
                    f"task.end: {self.end!r} is no token of {near(base.path)!r}{nearest(self.end, tokenizer.get_vocab())}"
                )
            tokenizer.eos_token = self.end
            tokenizer.pad_token = tokenizer.pad_token or self.end
        if tokenizer.eos_token_id is None:
            raise AttunementError(
                f"task: the tokenizer of {near(base.path)!r} names no token that ends a text, with which a completion is "
                "to be learned; say which of its tokens does, as in task.end='</s>'"
            )
        return tokenizer

    def model(self, base: Base, processor: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model = base.load(AutoModelForCausalLM.from_pretrained, **base.options())
        if self.new_tokens:
            make_room(model, len(processor))
        return model

    def recipe(self, model: Any, processor: Any, method: Any, on: str | None) -> tuple[Any, str | None]:
        if not self.new_tokens:
            return method, on
        return with_rows(model, processor.convert_tokens_to_ids(list(self.new_tokens)), method, on), None

    def for_training(self, rows: Dataset, model: Any, collate: Any) -> Dataset:
        if not self.packing:
            return rows
        check_packed(model, rows, collate)
        return pack(rows, self.max_length)

    def encode(self, table: Dataset, processor: Any, where: str) -> Dataset:
        names = set(self.roles).intersection(table.column_names)
        if "messages" in names:
            numbered = zip(numbers(table), table["messages"], strict=True)
            pieces = (conversation(talk, processor, f"{where}: row {number}") for number, talk in numbered)
        elif {"prompt", "completion"} <= names:
            check_text(table, "prompt", where, blank=True)
            check_text(table, "completion", where)
            pieces = (
                self._completion(p, c, processor) for p, c in zip(table["prompt"], table["completion"], strict=True)
            )
        elif "text" in names:
            check_text(table, "text", where)
            pieces = (self._completion("", text, processor) for text in table["text"])
        else:
            raise AttunementError(
                f"{where}: a causal LM needs the columns prompt and completion, or messages, or text; "
                f"found {', '.join(sorted(names)) or 'none of them'} (data.columns says which column plays which role)"
            )
        rows = [self._cut(*piece) for piece in pieces]
        return _dataset(
            input_ids=[ids for ids, _ in rows],
            attention_mask=[[1] * len(ids) for ids, _ in rows],
            labels=[labels for _, labels in rows],
        )

    def _completion(self, prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
        before = _prompt(prompt, tokenizer)
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return before + after, [IGNORED] * len(before) + after

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        prompt = next(i for i, label in enumerate(labels) if label != IGNORED)
        spare = max(0, len(ids) - self.max_length)
        first = min(prompt, spare)
        return ids[first : first + self.max_length], labels[first : first + self.max_length]

    def collator(self, processor: Any) -> Any:
        from transformers import DataCollatorForSeq2Seq

        return Collator(DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED), processor.pad_token_id)

    def for_metrics(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)  # (batch, tokens): the logits themselves would fill the memory

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        said, wanted = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
        return {"token_accuracy": float((said == wanted)[wanted != IGNORED].mean())}

    def answers(self, model: Any, rows: Dataset, processor: Any, batch_size: int) -> list[dict[str, Any]]:
        role = next((role for role in ("messages", "prompt", "text") if role in rows.column_names), None)
        if role is None:
            raise AttunementError(
                f"rows: expected a column prompt, messages or text, found {', '.join(rows.column_names)}"
            )
        if role != "messages":
            check_text(rows, role, "rows", blank=True)
        answers = []
        for row in rows[role]:
            if role == "messages" or self.chat:
                talk = row if role == "messages" else [{"role": "user", "content": row or ""}]
                talk = [{key: value for key, value in message.items() if value is not None} for message in talk]
                while talk and talk[-1]["role"] == "assistant":
                    talk = talk[:-1]
                ids = processor.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            else:
                ids = _prompt(row, processor) or _start(processor)
            given = torch.tensor([ids], device=next(model.parameters()).device)  # (1, tokens)
            said = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=processor.pad_token_id,
                **({} if self.end is None else {"eos_token_id": processor.eos_token_id}),  # else a model has its own
            )
            answers.append({"completion": processor.decode(said[0, given.shape[1] :], skip_special_tokens=True)})
        return answers


class ImageClassification(Task):
    """Images into one of several classes. An image is the bytes of a file, what `datasets` decodes, or a path: looked for
    beside the file that has the rows, then in the current folder."""

    kind: Literal["image-classification"] = "image-classification"
    labels: tuple[str, ...] | None = None
    """The classes in their order; without it those of the training rows, sorted."""

    roles: ClassVar[dict[str, bool]] = {"image": True, "label": True}
    metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    lazy: ClassVar[bool] = True

    def resolved(self, train: Dataset, where: str) -> ImageClassification:
        return self.model_copy(update={"labels": tuple(label_names(train, self.labels, where))})

    def processor(self, base: Base) -> Any:
        from transformers import AutoImageProcessor

        return base.load(AutoImageProcessor.from_pretrained, revision=base.revision)

    def model(self, base: Base, processor: Any) -> PreTrainedModel:
        from transformers import AutoModelForImageClassification

        labels = _label_config(self.labels)
        make = AutoModelForImageClassification.from_pretrained
        return base.load(make, ignore_mismatched_sizes=True, **base.options(), **labels)

    def encode(self, table: Dataset, processor: Any, where: str) -> Dataset:
        """Pixels are made when a batch is asked for: all images of a data set at once would not fit."""
        labelled = "label" in table.column_names
        ids = label_ids(table, self.labels or (), where) if labelled else []
        rows = table.remove_columns("label").add_column("labels", ids) if labelled else table

        def pixels(batch: dict[str, list]) -> dict[str, Any]:
            images = [_image(value, where) for value in batch["image"]]
            made = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}  # (batch, 3, height, width)
            return made | ({"labels": batch["labels"]} if "labels" in batch else {})

        return rows.with_transform(pixels)

    def collator(self, processor: Any) -> Any:
        from transformers import default_data_collator

        return default_data_collator

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return _classified(prediction)

    def answer(self, logits: torch.Tensor) -> dict[str, Any]:
        return _named(logits, self.labels or ())


AnyTask = Annotated[Classification | Regression | CausalLM | ImageClassification, Field(discriminator="kind")]


def _dataset(**columns: Sequence[Any]) -> Dataset:
    """Encoded rows with their `length`, by which batches are grouped."""
    from datasets import Dataset

    return Dataset.from_dict({**columns, "length": [len(ids) for ids in columns["input_ids"]]})


def _prompt(text: str | None, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, on which a completion follows: some tokenizers end every text."""
    ids: list[int] = tokenizer(text).input_ids if text else _start(tokenizer)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _start(tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def _label_config(labels: Sequence[str] | None) -> dict[str, Any]:
    names = labels or ()
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }


def _classified(prediction: EvalPrediction) -> dict[str, float]:
    from sklearn.metrics import f1_score

    said, wanted = np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
    return {"accuracy": float((said == wanted).mean()), "macro_f1": float(f1_score(wanted, said, average="macro"))}


def _named(logits: torch.Tensor, labels: Sequence[str]) -> dict[str, Any]:
    share = logits.float().softmax(-1)
    best = int(share.argmax())
    return {"label": labels[best], "probability": share[best].item()}


def _image(value: Any, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    try:
        return Image.open(io.BytesIO(value) if isinstance(value, bytes) else _beside(value, where)).convert("RGB")
    except (OSError, TypeError, UnidentifiedImageError) as error:
        raise AttunementError(f"{where}: an image cannot be read: {error}") from error


def _beside(path: str, where: str) -> Path:
    beside = Path(where).parent / path
    return beside if beside.is_file() else Path(path)


@torch.no_grad()
def _reads(model: Any, row: dict[str, Any], length: int) -> bool:
    """Whether a model takes the first tokens of a row."""
    device, training = next(model.parameters()).device, model.training
    inputs = {name: row[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in row}
    model.eval()
    try:
        model(**{name: torch.tensor([ids[:length]], device=device) for name, ids in inputs.items()})  # (1, length)
    except (RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    return True


@torch.inference_mode()
def _logits(model: PreTrainedModel, rows: Dataset, collator: Any, batch_size: int) -> Iterable[torch.Tensor]:
    """Logits of every row in the order of the rows; batches are made of rows of like length."""
    model.eval()
    device = next(model.parameters()).device
    lengths = rows["length"] if "length" in rows.column_names else [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        features = [{name: v for name, v in rows[i].items() if name not in ("labels", "length")} for i in chosen]
        batch = {name: v.to(device) for name, v in collator(features).items() if isinstance(v, torch.Tensor)}
        found |= dict(zip(chosen, model(**batch).logits.cpu(), strict=True))
    return [found[i] for i in range(len(order))]
