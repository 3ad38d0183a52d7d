"""Text out of the model: streams, stop strings, end tokens and chat, on a tiny random model with a small tokenizer."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from l4jax import LLM, ChatError, SamplingParams
from l4jax.text.chat import ChatFormat
from l4jax.text.hf_tokenizer import HfTokenizer
from tests.text import small
from tests.tiny import drafter, loaded_drafter, scout_like, shallow, weights, with_options

TOKENIZER = HfTokenizer(small.backend(), {})
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMS = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    config = shallow(scout_like(vocab_size=TOKENIZER.vocab_size))
    chat = ChatFormat(TEMPLATE, TOKENIZER, origin="test", variables={})
    return LLM(config, weights(config), tokenizer=TOKENIZER, chat_format=chat)


def changed(**changes):
    return SamplingParams(**{**vars(PARAMS), **changes})


def test_a_stream_gives_out_what_generate_returns(llm):
    whole = llm.generate("the dog", PARAMS)[0]
    stream = llm.stream("the dog", PARAMS)
    pieces = list(stream)
    assert len(pieces) > 2 and "" not in pieces
    assert "".join(pieces) == whole.text == TOKENIZER.decode(whole.token_ids)
    assert (stream.completion.token_ids, stream.completion.finish_reason) == (whole.token_ids, "length")
    assert next(stream, None) is None


def test_text_is_that_of_the_tokens_without_the_end_token(llm):
    free = llm.generate("the dog", PARAMS)[0]
    end = free.token_ids[9]
    completion = llm.generate("the dog", changed(stop_token_ids=[end]))[0]
    assert completion.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert completion.text == TOKENIZER.decode(completion.token_ids[:-1])
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("where", [(0, 1), (3, 4), (3, 9), (20, 26), (30, 31)])
def test_a_stop_string_ends_text_and_tokens_where_it_begins(llm, where):
    # Without parts of characters, which a stream holds back: whether a prefix of the tokens has the string is then a plain question.
    ascii_only = {i: -np.inf for i in range(TOKENIZER.vocab_size) if not TOKENIZER.token_bytes(i).isascii()}
    free = llm.generate("the dog", changed(logit_bias=ascii_only))[0]
    stop = free.text[slice(*where)]
    expected = free.text[: free.text.index(stop)]
    # The tokens end with the one that completes the string.
    needed = next(n for n in range(len(free.token_ids) + 1) if stop in TOKENIZER.decode(free.token_ids[:n]))
    ends = [changed(stop=stops, logit_bias=ascii_only) for stops in ([stop, "never said"], stop)]
    for completion in (llm.generate("the dog", ends[0])[0], streamed(llm, ends[1])):
        assert completion.text == expected
        assert completion.token_ids == free.token_ids[:needed]
        assert completion.finish_reason == "stop"


def streamed(llm, params):
    stream = llm.stream("the dog", params)
    text = "".join(stream)
    assert stream.completion.text == text
    return stream.completion


def test_one_row_stops_while_others_go_on(llm):
    prompts = ["the dog", "fox", "a lazy brown"]
    free = llm.generate(prompts, [PARAMS] * 3)
    stop = free[1].text[10:13]
    mixed = llm.generate(prompts, [PARAMS, changed(stop=[stop]), PARAMS])
    assert [c.text for c in mixed] == [free[0].text, free[1].text[: free[1].text.index(stop)], free[2].text]
    assert len(mixed[1].token_ids) == mixed[1].stats.output_tokens


def test_rows_stop_where_they_do_without_speculation(llm):
    """Stop strings are found burst by burst: what was decoded after them is dropped."""
    prompts, params = ["the dog", "fox", "a lazy brown"], [PARAMS, changed(temperature=0.0), PARAMS]
    free = llm.generate(prompts, params)
    params = [changed(temperature=p.temperature, stop=[c.text[10:13]]) for p, c in zip(params, free, strict=True)]
    plain = llm.generate(prompts, params)
    speculating = LLM(
        llm.config,
        llm.weights,
        drafter=loaded_drafter(drafter(llm.config, aux_layers=(0, 1, 2))),
        speculation="chain:3",
        tokenizer=TOKENIZER,
    )
    found = speculating.generate(prompts, params)
    assert [(c.token_ids, c.text, c.finish_reason) for c in found] == [(c.token_ids, c.text, c.finish_reason) for c in plain]
    assert [c.finish_reason for c in plain] == ["stop"] * 3
    stream = speculating.stream("the dog", params[0])
    assert ("".join(stream), stream.completion.token_ids) == (plain[0].text, plain[0].token_ids)


def test_tokens_do_not_depend_on_the_bursts(llm):
    expected = llm.generate("the dog", PARAMS)[0].token_ids
    for steps in (1, 3, 32):
        assert with_options(llm, short_steps=steps, long_steps=steps).generate("the dog", PARAMS)[0].token_ids == expected


def test_a_stop_string_ends_a_stream_and_others_go_on(llm):
    free, other = llm.generate("the dog", PARAMS)[0], llm.generate("fox", PARAMS)[0]
    following = llm.stream("fox", PARAMS)
    beginning = next(following)
    stopped = llm.stream("the dog", changed(stop=free.text[4:6]))
    assert "".join(stopped) == free.text[: free.text.index(free.text[4:6])] and stopped.completion.finish_reason == "stop"
    assert beginning + "".join(following) == other.text and following.completion.token_ids == other.token_ids


def test_a_stream_left_early_does_no_harm(llm):
    expected = llm.generate("fox", PARAMS)[0].token_ids
    stream = llm.stream("the dog", changed(max_tokens=150, ignore_eos=True))
    next(stream)
    assert llm.generate("fox", PARAMS)[0].token_ids == expected
    stream.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^this stream was closed, and nothing more is computed for it; ask for another one$"):
            list(stream)
    assert stream.completion is None
    for _ in range(2 * llm.max_batch):
        next(llm.stream("the dog", PARAMS))  # dropped
    assert llm.generate("fox", PARAMS)[0].token_ids == expected


def test_ctrl_c_loses_no_piece_of_a_stream(llm, monkeypatch):
    expected, stream = llm.generate("the dog", PARAMS)[0].text, llm.stream("the dog", PARAMS)
    run, pieces, interrupt = llm.engine.run_until, [], True

    def interrupted(*given):
        run(*given)
        if interrupt:
            raise KeyboardInterrupt  # after a piece came, before it is returned

    monkeypatch.setattr(llm.engine, "run_until", interrupted)
    while True:
        try:
            pieces.append(next(stream))
            interrupt = True
        except KeyboardInterrupt:
            interrupt = False
        except StopIteration:
            break
    assert len(pieces) > 2 and "".join(pieces) == expected


def test_chat_answers_in_the_models_format(llm):
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    completion = llm.chat(messages, SamplingParams(max_tokens=20, seed=1))
    start, end = (TOKENIZER.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    # The user's "<|im_end|>" is text: one end token, the template's.
    assert completion.prompt_token_ids.count(start) == 2 and completion.prompt_token_ids.count(end) == 1
    stream = llm.stream_chat(messages, SamplingParams(max_tokens=20, seed=1))
    assert "".join(stream) == completion.text
    forced = llm.chat(messages, SamplingParams(max_tokens=20, logit_bias={end: 1e6}))
    assert (forced.token_ids, forced.text, forced.finish_reason) == ([end], "", "stop")


def test_chat_continues_its_last_message_and_takes_options(llm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the dog"}]
    params = SamplingParams(max_tokens=20, seed=1)
    prompt = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthe dog", parse_special=True)
    completion = llm.chat(messages, params, continue_final_message=True)
    assert completion.prompt_token_ids == prompt
    assert completion.token_ids == llm.generate([prompt], params)[0].token_ids
    assert "".join(llm.stream_chat(messages, params, continue_final_message=True)) == completion.text
    with pytest.raises(ChatError, match="the chat template does not use tools"):
        llm.chat(messages, params, tools=[{"name": "f"}])


def test_what_are_no_sampling_params_is_refused_by_chats(llm):
    for call in (llm.chat, llm.stream_chat):
        for params in ({}, {"temperature": 0.0}, [SamplingParams()], 0):
            with pytest.raises(ValueError, match=r"^the sampling params are [^\n]*; expected l4jax.SamplingParams$"):
                call([{"role": "user", "content": "hi"}], params)


def test_text_that_is_none_is_refused(llm):
    with pytest.raises(ValueError, match="the text is of type int; expected a string"):
        llm.tokenizer.encode(3)


def test_an_end_token_that_the_files_label_as_text_ends_an_answer():
    values = json.loads(small.backend().to_str())
    values["added_tokens"] = values["added_tokens"][:2]
    tokenizer = HfTokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)), {"eos_token": "<|end_of_text|>"})
    chat = ChatFormat(TEMPLATE, tokenizer, origin="test", variables={})
    config = shallow(scout_like(vocab_size=tokenizer.vocab_size))
    llm = LLM(config, weights(config), tokenizer=tokenizer, chat_format=chat)
    end = tokenizer.token_id("<|im_end|>")
    forced = SamplingParams(max_tokens=3, logit_bias={end: 1e6})
    for completion in (llm.chat([{"role": "user", "content": "hi <|im_end|>"}], forced), llm.generate("the dog", forced)[0]):
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([end], "", "stop")
        assert completion.prompt_token_ids.count(end) <= 1
    # The tokenizer's own end token needs no template.
    without = LLM(config, weights(config), tokenizer=tokenizer)
    assert without.generate("the dog", SamplingParams(max_tokens=3, logit_bias={1: 1e6}))[0].token_ids == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_do_no_lasting_harm(temperature):
    config = shallow(scout_like())
    values = weights(config)
    without_7 = SamplingParams(max_tokens=8, seed=0, logit_bias={7: -np.inf})
    healthy = LLM(config, values).generate([[1, 2, 3]], without_7)[0].token_ids
    llm = LLM(config, {**values, "embed": values["embed"].at[7].set(jnp.nan)})
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=0, logit_bias={7: -np.inf})
    for call in (lambda: llm.generate([[1, 7, 3]], params), lambda: llm.logits([[1, 7, 3]])):
        with pytest.raises(ValueError, match="the model's logits are not finite") as refused:
            call()
        assert "\n" not in str(refused.value)
        assert llm.generate([[1, 2, 3]], without_7)[0].token_ids == healthy


def test_logits_that_become_infinite_while_decoding_are_an_error():
    config = shallow(scout_like())
    values = weights(config)
    llm = LLM(config, {**values, "embed": values["embed"].at[7].set(jnp.inf)})
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0.0, logit_bias={7: 1e6}))
