"""generate and score as a person starts them: a checkpoint, a file of prompts, responses, and their scores."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.__main__ import main
from tests.command_server import command_server
from tests.harness import pool
from tests.test_commands import MODEL, ROOT, command, data, lines  # noqa: F401  (data is a fixture)


@pytest.fixture(scope="module")
def folder(data) -> Path:  # noqa: F811
    """A checkpoint of two steps of fine-tuning, and its prompts; weights are drawn wide, so that draws differ."""
    flags = ["--tokenizer-model", data / "tokenizer", "--data-path", data / "sft.jsonl", "--train-iters", 2]
    command("sft", *MODEL, *flags, "--lr", 1e-3, "--save", data / "ckpt")
    records = [{"question": "1+2="}, {"prompt": "12+34="}, {"prompt_token_ids": [20, 21, 22]}, {"question": "1+2="}]
    (data / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return data


def generated(folder: Path, name: str, *flags: object, run=command) -> list[dict]:
    """Needs no size of the model and no tokenizer: both are in the checkpoint."""
    output = folder / f"{name}.jsonl"
    said = run(
        *("generate", "--load", folder / "ckpt", "--prompts", folder / "in.jsonl", "--output", output),
        *("--max-new-tokens", 10, "--num-samples", 2, "--fp64", *flags),
    )
    assert f"8 responses in {output}: mean length" in said.stdout
    return lines(output)


def scored(folder: Path, source: str, *flags: object, run=command) -> tuple[list[dict], str]:
    output = folder / f"{source}-scored.jsonl"
    said = run(
        *("score", "--load", folder / "ckpt", "--input", folder / f"{source}.jsonl", "--output", output),
        *("--fp64", *flags),
    )
    return lines(output), said.stdout


def torchrun(*words: object) -> subprocess.CompletedProcess:
    """Two processes, started by torchrun."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_dlm"]
        + [str(word) for word in words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def two_processes(*words: object) -> subprocess.CompletedProcess:
    """A job of two processes that need not import everything."""
    result = command_server().run([str(word) for word in words], ROOT, ranks=2, limit=300)
    assert result.codes == [0, 0], result.stdout + result.stderr
    return subprocess.CompletedProcess(words, 0, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def responses(folder) -> list[dict]:
    return generated(folder, "one")


def test_what_generate_records_is_what_score_finds(folder, responses) -> None:
    assert [(record["index"], record["sample"]) for record in responses] == [(i, s) for i in range(4) for s in range(2)]
    assert responses[0]["prompt_token_ids"] == responses[6]["prompt_token_ids"]
    assert len({json.dumps(responses[n]["token_ids"]) for n in (0, 1, 6, 7)}) == 4
    found, said = scored(folder, "one", "--metrics-jsonl", folder / "score-metrics.jsonl")
    tokens = 0
    for record, given in zip(found, responses, strict=True):
        assert record.items() >= given.items() and len(record["block_logprobs"]) == len(given["token_ids"])
        np.testing.assert_allclose(record["trace_logprobs"], given["logprobs"], rtol=0, atol=1e-10)
        tokens += len(given["token_ids"])
    shown = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in said.splitlines() if "  " in line}
    assert shown["lines"] == "8" and shown["response tokens"] == str(tokens)
    assert float(shown["max |logprobs - trace|"]) < 1e-10
    assert lines(folder / "score-metrics.jsonl")[0]["score/tokens"] == tokens


def test_another_block_size_than_that_of_the_checkpoint(folder) -> None:
    flags = ("--block-size", 8, "--denoising-steps", 3, "--remasking", "static", "--temperature", 0.7, "--top-k", 9)
    made = generated(folder, "blocks", *flags, "--ignore-eos")
    assert {(one["block_size"], one["temperature"], len(one["token_ids"])) for one in made} == {(8, 0.7, 10)}
    found, _ = scored(folder, "blocks")
    for record, given in zip(found, made, strict=True):
        np.testing.assert_allclose(record["trace_logprobs"], given["logprobs"], rtol=0, atol=1e-10)
    other, _ = scored(folder, "blocks", "--block-size", 4)
    assert {record["block_size"] for record in other} == {4}
    assert any(not np.allclose(one["block_logprobs"], two["block_logprobs"]) for one, two in zip(found, other))


def test_two_processes_write_the_same_files(folder, responses) -> None:
    made = generated(folder, "two", "--tensor-model-parallel-size", 2, "--sequence-parallel", run=torchrun)
    for one, other in zip(made, responses, strict=True):
        assert all(one[name] == other[name] for name in ("index", "sample", "token_ids", "step_map", "tail_token_ids"))
    found, said = scored(folder, "two", "--pipeline-model-parallel-size", 2, run=two_processes)
    for one, other in zip(found, responses, strict=True):
        np.testing.assert_allclose(one["trace_logprobs"], other["logprobs"], rtol=0, atol=1e-10)
    assert said.count("response tokens") == 1


def mistakes(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and message of each command, all in this process."""
    from megatron_dlm.parallel import groups

    found = []
    for words in commands:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found.append((main(words), said.getvalue()))
        groups.destroy(keep_world=True)
    return found


def test_mistakes_that_are_found_before_anything_is_generated(folder) -> None:
    prompts, response, old = folder / "in.jsonl", folder / "short.jsonl", folder / "old.jsonl"
    response.write_text('{"prompt_token_ids": [1], "token_ids": [2, 3, 4], "step_map": [1, 1, 2]}\n')
    old.write_text("old\n")
    cases = [
        (["generate", "--output", "/dev/null/x"], "--output /dev/null/x cannot be written to"),
        (["generate", "--output", str(folder)], f"--output {folder} cannot be written to (Is a directory)"),
        (["generate", "--max-new-tokens", "2045"], f"{prompts}, line 1: this prompt has 4 tokens"),
        (["generate", "--stop-token-ids", "100000"], "--stop-token-ids 100000 is not a token"),
        (["generate", "--denoising-steps", "5"], "--denoising-steps 5 is more than the 4 tokens of a block"),
        (["generate", "--hidden-size", "64"], "has --hidden-size 32, and this one 64"),
        (["generate", "--ckpt-step", "1"], "iter_0000001 is missing"),
        (["generate", "--prompts", str(folder / "none.jsonl")], "none.jsonl does not exist"),
        (["score", "--output", "/dev/null/x"], "--output /dev/null/x cannot be written to"),
        (["score", "--input", str(prompts)], f"{prompts}, line 1: the field 'prompt_token_ids' is missing"),
        (["score", "--block-size", "8"], f"{response}, line 1: the response ends 4 tokens before the end of its block"),
        (["score", "--max-tokens-per-row", "7"], f"{response}, line 1: this response needs a row of 8 tokens"),
        (["score", "--rotary-base", "2"], "has --rotary-base 10000.0, and this one 2.0"),
    ]
    defaults = {"generate": ["--prompts", str(prompts)], "score": ["--input", str(response)]}
    given = lambda words: [words[0], "--load", str(folder / "ckpt"), *defaults[words[0]], "--output", str(old)]
    (found,) = pool(1).run(mistakes, [[*given(words), *words[1:]] for words, _ in cases])
    for (code, said), (words, sentence) in zip(found, cases, strict=True):
        assert code == 2 and sentence in said and len(said.splitlines()) == 1, (words, said)
    assert old.read_text() == "old\n"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["generate"], "--load is not set"),
        (["generate", "--load", "x"], "--prompts is not set"),
        (["generate", "--load", "x", "--prompts", "a", "--output", "a"], "--output a is the file that --prompts names"),
        (
            ["generate", "--load", "x", "--remasking", "random"],
            "--remasking needs static, dynamic, sequential or entropy_bounded",
        ),
        (["generate", "--load", "x", "--save", "y"], "generate has no flag --save"),
        (["generate", "--load", "/nowhere", "--prompts", "a", "--output", "b"], "no checkpoint folder /nowhere"),
        (["score", "--load", "x"], "--input is not set"),
        (["score", "--load", "x", "--input", "a"], "--output is not set"),
        (["score", "--load", "x", "--apply-chat-template"], "score has no flag --apply-chat-template"),
        (["score", "--load", "x", "--seed", "1"], "score has no flag --seed"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(capsys, words: list[str], sentence: str) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert sentence in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_models_of_full_attention_and_with_logits_ahead(data) -> None:  # noqa: F811
    """Fine-tuned, then generated from, scored and evaluated: the checkpoint says how such a model decodes."""
    flags = ["--tokenizer-model", data / "tokenizer", "--data-path", data / "sft.jsonl", "--train-iters", 1]
    at = MODEL.index("--block-size")
    wide = [*MODEL[:at], *MODEL[at + 2 :], "--full-attention", "--logit-shift", 1]
    whole, ahead = data / "whole", data / "ahead"
    command("sft", *wide, *flags, "--save", whole)
    command("sft", *MODEL, "--logit-shift", 1, *flags, "--save", ahead)
    (data / "one.jsonl").write_text(json.dumps({"question": "1+2="}) + "\n")
    for folder, more in ((whole, ["--rollout-block-size", 4]), (ahead, [])):
        output = folder / "out.jsonl"
        asked = ["--load", folder, "--prompts", data / "one.jsonl", "--output", output, "--max-new-tokens", 10]
        command("generate", *asked, *more)
        (record,) = lines(output)
        assert 0 < len(record["token_ids"]) <= 10 and record["num_forwards"] == max(
            record["step_map"] + record["tail_step_map"]
        )
        asked = ["--load", folder, "--eval-prompt-data", data / "prompts.jsonl", "--eval-num-prompts", 3]
        said = command("evaluate", *asked, *more, "--rollout-max-response-len", 10)
        assert "accuracy" in said.stdout
    output = whole / "exact.jsonl"
    asked = ["--load", whole, "--prompts", data / "one.jsonl", "--output", output, "--max-new-tokens", 10, "--fp64"]
    command("generate", *asked, "--rollout-block-size", 4, "--no-prefix-cache", "--horizon", 2, "--remasking", "static")
    command("score", "--load", whole, "--input", output, "--output", whole / "scored.jsonl", "--fp64")
    (record,) = lines(whole / "scored.jsonl")
    np.testing.assert_allclose(record["trace_logprobs"], record["logprobs"], rtol=0, atol=1e-10)
    asked = ["--load", whole, "--input", output, "--output", data / "no.jsonl"]
    assert (
        "--block-size 4 does not go with full attention" in command("score", *asked, "--block-size", 4, expect=2).stderr
    )
    said = command("score", *asked, "--max-tokens-per-row", 9, expect=2).stderr
    assert "needs a row of 14 tokens for the text and its masks" in said
