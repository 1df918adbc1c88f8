"""How responses are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMS = ("boxed", "think")  # names that --format-reward knows


@dataclass(slots=True)
class JudgeConfig:
    """How responses are judged."""

    reward: Literal["auto", "math", "reasoning_gym", "multiple_choice", "judge", "code"] = "auto"
    """Judge: each prompt's own (auto: reasoning_gym prompts ask their generator, programs are run against the tests of
    their record, other prompts of files compare mathematical answers unless a record names its verifier); one of math,
    multiple_choice and judge (the model of --judge-url, which compares any answer with the ground truth) for all
    prompts; or reasoning_gym, which refuses prompts of files, or code, which refuses prompts without tests."""
    reward_workers: int = 2
    """Processes that judge responses."""
    reward_timeout: float = 5.0
    """Seconds after which judging one response is given up."""
    code_isolation: Literal["auto", "bubblewrap", "namespaces", "landlock", "none"] = "auto"
    """What keeps the programs that a model writes away from everything: the strongest that this host offers (auto,
    which refuses to run them where there is none), one of bubblewrap, namespaces and landlock, or none, which runs them
    with all that this user may do."""
    code_time_limit: float = 2.0
    """Seconds of CPU time of a program in one test, where the prompt has no test_time_limit. A program that sleeps is
    ended after three times that and a second."""
    code_response_time_limit: float = 60.0
    """Seconds for all tests of a response; tests that it leaves no time for are failed."""
    code_memory_limit_mib: int = 1024
    """Memory, in MiB, of each process of a program, and of all of them together."""
    code_max_output_kib: int = 1024
    """Output of a program, in KiB, beyond which it is ended."""
    code_max_processes: int = 8
    """Processes and threads that a program may have at a time (with landlock: one)."""
    judge_url: str | None = None
    """Address of an OpenAI-compatible endpoint whose model judges, such as http://127.0.0.1:8000/v1. If it wants a key,
    put that into the environment variable JUDGE_API_KEY."""
    judge_model: str | None = None
    """Name of the judging model at the endpoint."""
    judge_votes: int = 3
    """Times that the judging model is asked about the same thing."""
    judge_temperature: float = 0.6
    """Temperature of the judging model."""
    judge_max_tokens: int = 8192
    """Longest reply of the judging model, in tokens."""
    judge_timeout: float = 300.0
    """Seconds after which a request to the endpoint is given up."""
    judge_retries: int = 3
    """Times that a request which failed (no connection, no reply in time, an overloaded server) is repeated."""
    judge_concurrency: int = 32
    """Requests to the endpoint at the same time, per process."""


@dataclass(slots=True)
class RewardConfig(JudgeConfig):
    """How responses are judged, and what else they earn."""

    reward_value: Literal["correct", "score"] = "correct"
    """What a verdict is worth: 1 for a right response and 0 for any other, or the score of judges that give one (the
    share of tests that a program passes). --min-group-accuracy and --max-group-accuracy count right responses in either
    case."""
    format_reward: str | None = None
    """Form that the whole text of a response must have: boxed (an answer in \\boxed{} that closes), think (thoughts
    between <think> and </think>, where the first may stand in the prompt, and then an answer), or a regular expression
    of Python, in which a dot matches line ends too."""
    format_reward_coef: float = 0.1
    """Reward of a response that has the form of --format-reward."""
    overlong_buffer_len: int = 0
    """Tokens before the longest response allowed within which a growing penalty is taken off the reward, up to
    --overlong-penalty-coef at the limit; 0 for none."""
    overlong_penalty_coef: float = 1.0
    """Largest penalty of --overlong-buffer-len."""
    short_reward_coef: float = 0.0
    """Weight of a reward that grows, from -0.5 to 0.5, from the longest response of a group to its shortest; a wrong
    response never gains by it."""
    speed_reward_coef: float = 0.0
    """Weight of the advantage in speed, tokens per model pass, which is normalised in its group apart from the
    reward."""
    speed_min_range: float = 0.01
    """Give no advantage in speed where tokens per model pass differ by less than this within a group."""
    speed_reward_of: Literal["all", "correct"] = "all"
    """Responses that are compared in speed: all of a group, or the right ones."""
    process_reward: str | None = None
    """Judge of the parts of a response: endpoint (the model of --judge-url), or a Python function, as
    module:function."""
    process_chunk_tokens: int = 200
    """Tokens per part of a response that --process-reward judges."""
    process_chunk_grid: Literal["block", "token"] = "block"
    """Where a part ends: with the decoding block that it reaches into, or after exactly --process-chunk-tokens."""
