"""A run as a model of the lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, MIT licence).

    trainer = Trainer.from_run("runs/quickstart")
    model = StackLM(trainer.program, trainer.trained, trainer.tokenizer)
    print(evaluate_tasks(model, ["lambada_openai", "my_tasks/"])["results"])

`lm_eval.simple_evaluate(model=model, ...)` takes it too. Texts are tokenized, cut and scored as the harness's
own `HFLM` does of the folder that `stack export --to hf` writes, so both give the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

from stack.config.errors import StackError
from stack.data.chat import ChatTemplate
from stack.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from stack.evaluation.likelihood import Continuation, Likelihood, likelihoods
from stack.inference.generate import stream
from stack.inference.text import end_tokens
from stack.parallel.processes import first
from stack.step.program import Program

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise StackError(
        f"tasks of the lm-evaluation-harness need its package ({error.name} is missing); install the extra:"
        " pip install 'stack[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256
"""That a task generates at most where it does not say, as of the harness's own models."""
_CHUNK = 16  # New tokens between two looks for stop strings.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""What generation may be told, as it changes nothing."""

type _Request = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation, and the tokens of both."""
type _Scored = Callable[[int, Likelihood], None]


class StackLM(TemplateLM):
    """A decoder and its tokenizer, asked for likelihoods and texts; batches use the whole mesh of the run.

    Every process of a run calls it with the same requests and gets all answers; the harness's own cache of
    answers (`use_cache`) is a file for one process. Rows of like length share a batch of `eval.batch_size`.

    Text is tokenized as the tokenizer's post-processor says, which may begin it with a token of its own
    (Llama's) or not (GPT-2's); where there is none, a text begins with the token that begins a document, as
    it does in training. Special words in a text are those words, but of the tokenizer `bytes`, which knows
    none.
    """

    def __init__(
        self,
        program: Program,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        """Takes a run.

        Args:
          program: of the run, of a decoder.
          params: that lie as `program.parameters`.
          tokenizer: of the run.
          add_bos_token: whether every text begins with the token that begins a document; None: as above.
          seed: of texts that are sampled.

        Raises:
          StackError: the model is no decoder.
        """
        super().__init__()
        model = program.config.model
        if model.shape != "decoder":
            raise StackError(
                f"model.kind={model.kind} does not predict the next token; tasks of the lm-evaluation-harness"
                " are of decoders"
            )
        self.program = program
        self.params = params
        self.words = tokenizer
        self.seed = seed
        self.max_length: int = model.max_length
        self._encode = _encoder(tokenizer, add_bos_token)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.words.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context stands for: what begins a document."""
        return self.words.bos

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a text at most, where a task does not say."""
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What requests that the harness keeps are known by."""
        return self.words.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results tell of the model."""
        config = self.program.config
        return {"model_num_parameters": self.program.num_parameters, "model_dtype": config.model.dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """The tokens of a text; `add_special_tokens`: begun as the class says; None: unless it already is."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.words.decode([self.words.bos], marks=True))
        return self._encode(string, add_special_tokens)

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log of its probability, nats, and whether it is the likeliest.

        An empty context is the token that begins a document; of a long one the last tokens are read.

        Raises:
          StackError: a continuation has no tokens, or more than the model reads.
        """
        for number, (_, continuation) in enumerate(request.args for request in requests):
            if not continuation:
                raise StackError(f"loglikelihood request {number} has an empty continuation; mend the task")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not first())

    def _loglikelihood_tokens(
        self, requests: "list[_Request]", disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        parts = [Continuation(context or [self.prefix_token_id], tokens) for _, context, tokens in requests]
        for (_, text), _, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                raise StackError(
                    f"the continuation {text[:40]!r} has {len(tokens):,} tokens after its context's; it"
                    f" takes 1 to {self.max_length:,} (model.max_length); mend the task, or leave it out"
                )

        def keep(number: int, each: Likelihood) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number][0], (-each.nll, each.is_greedy))

        scored = self._score(parts, "loglikelihood", keep, quiet=disable_tqdm)
        return [(-each.nll, each.is_greedy) for each in scored]

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Of each text: log of the probability of all its tokens, nats.

        Each token is scored once: rows of `model.max_length` that do not overlap, but the last, which goes
        back for as much context as fits.
        """
        texts = [request.args[0] for request in requests]
        parts: list[Continuation] = []
        owner: list[int] = []
        for number, text in enumerate(texts):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            some = [Continuation(*utils.make_disjoint_window(window)) for window in windows]
            parts += some
            owner += [number] * len(some)
        totals = [0.0] * len(texts)
        scored = self._score(parts, "loglikelihood_rolling", None, quiet=disable_tqdm)
        for number, each in zip(owner, scored, strict=True):
            totals[number] -= each.nll
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _score(
        self, parts: Sequence[Continuation], name: str, keep: _Scored | None, *, quiet: bool
    ) -> list[Likelihood]:
        with tqdm(total=len(parts), desc=name, disable=quiet or not first()) as bar:

            def told(number: int, each: Likelihood) -> None:
                bar.update()
                if keep is not None:
                    keep(number, each)

            return likelihoods(self.program, self.params, parts, told=told)

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Of each (context, options): what the model writes after it, up to the first stop string.

        Options are `until`, `max_gen_toks` and its other names, `do_sample`, `temperature`, `top_k` and
        `top_p`; without `do_sample` or a temperature the likeliest token is taken. Of a context that leaves
        no room for `max_gen_toks` in `model.max_length` the last tokens are read.

        Raises:
          StackError: another option, or `max_gen_toks` leaves no room for a context.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or not first()) as bar:
            for numbers in groups.values():
                context, options = zip(*(requests[number].args for number in numbers), strict=True)
                for place, text in self._write(context, self._options(options[0])):
                    texts[numbers[place]] = text
                    self.cache_hook.add_partial("generate_until", (context[place], options[place]), text)
                    bar.update()
        return [texts[number] for number in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options of generation that Stack knows: those of `stream`, and `until`."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until = [text for text in handle_stop_sequences(options.pop("until"), eos=None) if text]
        length, sampled = options.pop("max_gen_toks"), options.pop("do_sample", False)
        temperature = options.pop("temperature", 0.0)
        known = {
            "length": length,
            "until": until,
            "temperature": temperature if sampled else 0.0,
            "top_k": options.pop("top_k", None) or None,
            "top_p": options.pop("top_p", None) or 1.0,
        }
        for name, value in options.items():
            if value is not None and _NEUTRAL.get(name) != value:
                raise StackError(
                    f"generation_kwargs of the task: {name}={value!r} is not known here; leave it out, or"
                    " generate with until, max_gen_toks, do_sample, temperature, top_k and top_p"
                )
        if not 0 < length < self.max_length:
            raise StackError(
                f"generation_kwargs of the task: max_gen_toks={length} leaves no room for a context in"
                f" model.max_length={self.max_length}; set max_gen_toks to less, as --gen-kwargs does"
            )
        return known

    def _write(self, contexts: Sequence[str], options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """The number of each context and what is written after it, the longest first."""
        room = self.max_length - options["length"]
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        config = self.program.config
        size = min(config.eval.batch_size or config.train.batch_size, len(prompts))
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for turn, some in enumerate(batched(order, size)):
            # The last batch is filled up, so that one program does for all.
            rows = [prompts[number] for number in (*some, *some[-1:] * (size - len(some)))]
            yield from zip(some, self._continue(rows, len(some), self.seed + turn, **options), strict=False)

    def _continue(
        self, prompts: list[list[int]], count: int, seed: int, *, until: list[str], **options: Any
    ) -> list[str]:
        """Texts after the first `count` prompts; ends when each has a stop string or is done."""
        eos = end_tokens(self.words, self.program.config)
        chunk = _CHUNK if until else options["length"]
        new: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * count
        for more in stream(self.program, self.params, prompts, chunk=chunk, seed=seed, eos=eos, **options):
            for number, tokens in enumerate(more[:count]):
                new[number] += tokens
                if tokens and not stopped[number]:
                    text = self.words.decode(new[number])
                    stopped[number] = any(word in text for word in until)
            if all(stopped):
                break
        stop = [*until, self.words.decode([self.words.eos], marks=True)]
        return [
            postprocess_generated_text(self.words.decode(tokens), stop=stop, think_end_token=None)
            for tokens in new[:count]
        ]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's own, where one is asked for.

        Raises:
          StackError: it has none, or one is asked for by name.
        """
        return self._template(chat_template).source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as text; without `add_generation_prompt` the last one is to be gone on with.

        Raises:
          StackError: the tokenizer has no template, or it fails.
        """
        text = self._template(True).render(chat_history, "a task", ask=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    def _template(self, name: bool | str) -> ChatTemplate:
        if self.words.chat_template is None:
            raise StackError(
                "the tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json, or"
                " ask without one"
            )
        if isinstance(name, str):
            raise StackError(f"chat template {name!r}: there is one, without a name; ask for that")
        return ChatTemplate.of(self.words, "messages")


def _encoder(tokenizer: Tokenizer, add_bos_token: bool | None) -> Callable[[str, bool], list[int]]:
    """Text to tokens, begun, where that is asked for, as the class says."""
    model, bos = None, tokenizer.bos
    if isinstance(tokenizer, HuggingFaceTokenizer):
        model = tokenizer.with_marks()
    own = model is not None and model.post_processor is not None

    def encode(text: str, begin: bool) -> list[int]:
        if model is None:
            ids = tokenizer.encode_batch([text])[0].tolist()
        else:
            ids = model.encode(text, add_special_tokens=begin and own and add_bos_token is None).ids
        begin = begin and (not own if add_bos_token is None else add_bos_token)
        return [bos, *ids] if begin else ids

    return encode
