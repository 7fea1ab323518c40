"""What vLLM does on GPUs alone, as far as a CPU can run it: `pretend` says how."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Engines
from test_engine_steps import SLOTS, mixtures
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.config.compilation import CompilationConfig, CompilationMode
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from logo import LoGo
from logo.backends.vllm import graphs, hooks, ops, runner_v2
from logo.backends.vllm.marks import Span, probing, seal

KINDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "v2": ({"PRETEND_V2": "1"}, {}),
    "compiled": ({"PRETEND_COMPILE": "1"}, {"backend": "eager"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_tokens_are_the_librarys(
    kind: str,
    engines: Engines,
    tmp_path: Path,
    logo: LoGo,
    rows: list[str],
) -> None:
    environment, compilation = KINDS[kind]
    flags = SLOTS | {"max_num_batched_tokens": 48, "max_num_seqs": 8, "max_model_len": 128}
    if compilation:
        flags |= {"enforce_eager": False, "compilation_config": {"mode": 3, **compilation}}
    count = 24
    wanted = [m if i % 8 else {} for i, m in enumerate(mixtures(logo.names, count))]
    prompts = [*rows[:5], " ".join(rows[:6])]  # the last one is read in chunks
    probes = [{"do": "probe", "prompts": prompts, "signal": signal} for signal in ("calibrated", "norm")]
    jobs = {"do": "generate", "rows": list(zip(rows, wanted, strict=False)), "max_tokens": 8}
    found = engines.run(
        tmp_path,
        flags,
        {"k": 4},
        *probes,
        jobs,
        *({"do": what} for what in ("pieces", "runner")),
        **environment,
        **({"VLLM_CACHE_ROOT": str(tmp_path / "cache")} if compilation else {}),
    )
    *scores, made, pieces, runner = found
    for one, signal in zip(scores, ("calibrated", "norm"), strict=True):
        for prompt, own, expected in zip(prompts, one, logo.select(prompts, signal=signal), strict=True):
            assert own == pytest.approx(list(expected.scores.values()), rel=1e-3, abs=1e-3), (signal, prompt)
    answers = logo.generate(rows[:count], adapters=wanted, max_new_tokens=8, batch_size=8)
    assert made["tokens"] == [list(answer.token_ids) for answer in answers] and not any(made["failed"])
    assert (runner == "vllm.v1.worker.cpu.model_runner") == ("v2" in kind)
    if compilation:
        [pieces] = pieces
        tapped = [piece for piece in pieces if "logo.tap.default" in piece["operators"]]
        assert tapped and all(piece["split"] and set(piece["operators"]) == {"logo.tap.default"} for piece in tapped)
        # Half of the layers is read, at the input of their q_proj, and the residual stream once.
        assert sum(len(piece["operators"]) for piece in tapped) < len(pieces) / 3


# -- graphs -----------------------------------------------------------------------------------------------------------


def settled(mode: CompilationMode, operators: list[str]) -> VllmConfig:
    config = VllmConfig()
    config.compilation_config = CompilationConfig(mode=mode, splitting_ops=list(operators))
    return config


def test_the_model_is_split_at_taps_where_it_is_split_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for operators, mode in ((["vllm::unified_attention_with_output"], CompilationMode.VLLM_COMPILE), ([], 0)):
        config = settled(CompilationMode(mode), operators)
        for _ in range(2):
            assert graphs.split(config) == bool(operators)
        assert config.compilation_config.splitting_ops == ([*operators, ops.NAME] if operators else [])
        assert graphs.compiled(config) == bool(mode)
    monkeypatch.setenv(graphs.BREAKABLE, "1")
    assert not graphs.split(settled(CompilationMode.VLLM_COMPILE, ["vllm::unified_attention_with_output"]))


def test_what_is_compiled_is_known_to_vllms_cache() -> None:
    digests = set()
    for said in (None, ["False", "one"], ["False", "two"]):
        config = VllmConfig(additional_config={"logo": {"pool": "p"}})
        if said is not None:
            graphs.stamp(config, said)
        assert config.additional_config["logo"] == {"pool": "p"}
        digests.add(config.compute_hash())
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("mode", "split", "expected"),
    [
        ("FULL_AND_PIECEWISE", True, "PIECEWISE"),
        ("FULL_AND_PIECEWISE", False, "NONE"),
        ("FULL", True, "NONE"),
        ("FULL_DECODE_ONLY", True, "NONE"),
        ("PIECEWISE", True, "PIECEWISE"),
        ("PIECEWISE", False, "NONE"),
    ],
)
def test_a_step_that_reads_a_prompt_takes_no_graph_without_taps(
    mode: str, split: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils

    config = settled(CompilationMode.VLLM_COMPILE, CompilationConfig._attention_ops)
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    config.compilation_config.max_cudagraph_capture_size = 8
    worker = SimpleNamespace(reading=False, split=split)

    v1 = CudagraphDispatcher(config)
    v1.initialize_cudagraph_keys(CUDAGraphMode[mode], 1)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda self: None)
    v2 = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), CUDAGraphMode[mode], 1)
    v2._graphs_captured = True

    def found() -> tuple[CUDAGraphMode, CUDAGraphMode]:
        """For three requests with a token each, which are padded to a graph of four."""
        own, described = graphs.dispatch_v1(CudagraphDispatcher.dispatch, worker, v1, num_tokens=3, uniform_decode=True)
        other = graphs.dispatch_v2(cudagraph_utils.CudaGraphManager.dispatch, worker, v2, 3, 3, 1, 0)
        if own == CUDAGraphMode.NONE:
            assert described.num_tokens == 3
        if other.cg_mode == CUDAGraphMode.NONE:
            assert (other.num_tokens, other.num_reqs, other.uniform_token_count) == (3, 3, None)
        return own, other.cg_mode

    usual = CUDAGraphMode.PIECEWISE if mode == "PIECEWISE" else CUDAGraphMode.FULL
    assert found() == (usual, usual)
    worker.reading = True
    own, other = found()
    assert own == CUDAGraphMode[expected]
    # Runner V2 takes no second choice: without a graph rather than one by parts.
    assert other == (CUDAGraphMode.PIECEWISE if (mode, split) == ("PIECEWISE", True) else CUDAGraphMode.NONE)


# -- runner V2, by vLLM's own classes ---------------------------------------------------------------------------------


def scheduled(tokens: dict[str, int], *new: NewRequestData) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    made.scheduled_new_reqs, made.num_scheduled_tokens = list(new), tokens
    made.total_num_scheduled_tokens = sum(tokens.values())
    return made


def request(request_id: str, prompt: list[int], key: str | None, computed: int = 0, **more: Any) -> NewRequestData:
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1)
    if key is not None:
        with probing(key, "norm"):
            seal(parameters)
    return NewRequestData(
        req_id=request_id,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=parameters,
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=computed,
        lora_request=None,
        **more,
    )


class Runner:
    """The order in which runner V2 calls its own functions (`GPUModelRunner.add_requests`, `finish_requests`)."""

    def __init__(self) -> None:
        self.lora_manager = SimpleNamespace(
            logo=SimpleNamespace(requests={}, running=(), answers=(), late=(), reading=False, spans=())
        )
        self.cudagraph_manager = SimpleNamespace()

    def _remove_request(self, req_id: str) -> None:
        hooks._forget(lambda self, req_id: None, self, req_id)

    def step(self, output: SchedulerOutput, gone: tuple[str, ...] = ()) -> Any:
        """Probes' rows, for a batch in the order that is scheduled."""
        for req_id in gone:
            self._remove_request(req_id)

        def add_requests(self: Any, output: SchedulerOutput) -> None:
            for new in output.scheduled_new_reqs:
                self._remove_request(new.req_id)

        hooks._remember(add_requests, self, output)
        assert self.cudagraph_manager.logo is self.lora_manager.logo
        return self.lora_manager.logo

    def rows(self, order: list[str], counts: list[int], computed: list[int]) -> list[Span]:
        import numpy as np
        from vllm.v1.worker.gpu.input_batch import InputBatch

        made = InputBatch.__new__(InputBatch)  # with tensors on a GPU otherwise
        made.req_ids = order
        made.num_scheduled_tokens = np.array(counts, dtype=np.int32)
        made.num_computed_tokens_np = np.array(computed, dtype=np.int32)
        hooks._spans_v2(lambda *_: made, self, None)
        return list(self.lora_manager.logo.spans)


def test_probes_of_runner_v2_are_known_until_they_end() -> None:
    runner, prompt = Runner(), [1, 5, 6, 7, 8]
    worker = runner.step(scheduled({"a": 3, "b": 4}, request("a", prompt, "key"), request("b", [1, 2, 3, 4], None)))
    assert worker.reading and set(worker.running) == {"a"}
    [first] = runner.rows(["b", "a"], [4, 3], [0, 0])
    assert (first.key, first.row, first.start, first.count, first.total) == ("key", 4, 0, 3, 5)
    worker = runner.step(scheduled({"b": 1}))  # only the other one is in this step
    assert not worker.reading
    worker = runner.step(scheduled({"a": 2, "b": 1}))
    [second] = runner.rows(["b", "a"], [1, 2], [4, 3])
    assert worker.reading and (second.row, second.start, second.count) == (1, 3, 2)
    worker = runner.step(scheduled({"a": 1}))  # scheduled once more, before it is known to have ended
    assert runner.rows(["a"], [1], [5]) == []
    # Put back and taken up again: a new request for this runner, which reads it from its beginning.
    worker = runner.step(scheduled({"b": 1}), gone=("a",))
    assert not worker.running and not worker.reading
    worker = runner.step(scheduled({"a": 5}, request("a", prompt, "key", prefill_token_ids=prompt)))
    assert [span.start for span in runner.rows(["a"], [5], [0])] == [0]
    # The same id without an end between, and another prompt; then no probe.
    worker = runner.step(scheduled({"a": 2}, request("a", [1, 9], "other")))
    assert [span.key for span in runner.rows(["a"], [2], [0])] == ["other"]
    worker = runner.step(scheduled({"a": 2}, request("a", [1, 9], None)))
    assert not worker.running and not worker.reading and runner.rows(["a"], [2], [0]) == []


def test_rows_of_speculated_tokens_are_counted() -> None:
    known = dict(runner_v2.remembered(scheduled({"p": 3}, request("p", [1, 2, 3], "key"))))
    batch = SimpleNamespace(req_ids=["d", "p"], num_scheduled_tokens=[4, 3], num_computed_tokens_np=[9, 0])
    [span] = runner_v2.spans(known, batch)  # a decoded request with three drafts comes first
    assert (span.row, span.count) == (4, 3)
