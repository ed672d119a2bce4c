"""A pytest plugin that runs tests written for the CPU on the simulated accelerator, some steps ahead of it.

``pytest -p tests.accelerator.plugin tests/agent/test_loops.py`` makes the accelerator the default device, so that the
tensors and modules of each test lie there.
"""

from collections.abc import Iterator
from typing import Final

import pytest
import torch

from tests.accelerator.device import accelerator_of_process

LAG_SECONDS: Final = 0.005
"""Several steps of the small trainings in the tests."""

MODULES: Final = (
    "agc",
    "changed_gradients",
    "clip_grad",
    "clipping",
    "identity",
    "lifetimes",
    "loops",
    "loss_forms",
    "new_optimizers",
    "origin",
    "random_trainings",
    "resting_weights",
    "steps",
    "traps",
    "unstepped",
    "wrappers",
)
"""The modules of ``tests/agent`` whose tests run on the accelerator as well."""

LEFT_OUT: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "the simulation has neither sparse nor complex tensors": {
        "agc": ("test_sparse_rows_are_clipped_as_dense_ones",),
        "traps": (
            "test_complex_empty_and_zero_dimensional",
            "test_sparse_gradients_that_float32_cannot_square",
            "test_sparse_gradients",
            "test_a_sparse_gradient_without_rows_is_zero",
        ),
    },
    "the simulation can neither be compiled for, pickled, forked nor be in a process group": {
        "traps": ("test_compiled",),
        "lifetimes": (
            "test_a_watched_model_copies_and_pickles",
            "test_a_model_that_holds_its_agent_copies_and_pickles",
        ),
        "origin": (
            "test_hooks_see_nothing_of_a_copy",
            "test_where_the_graph_cannot_be_read_hooks_watch_the_next_steps_and_go",
            "test_origin_under_fsdp2",
        ),
        "clipping": (
            "test_a_forked_child_is_clipped_too",
            "test_several_ranks_clip_what_one_would",
            "test_a_child_can_stop_clipping",
        ),
    },
    "the test starts programs of its own": {
        "steps": ("test_a_gradient_is_looked_at_by_no_thread_but_its_own",),
        "traps": ("test_data_parallel_rank_0_reports",),
    },
    "the test makes some hundred trainings, which takes too long behind a lag": {
        "steps": ("test_accumulation_over_any_number_of_batches_sums_the_loss",),
    },
    "a default device is one thread's, and these tests train in several": {
        "steps": (
            "test_trainings_in_several_threads_have_each_their_own_loss",
            "test_a_training_that_moves_to_another_thread_keeps_its_loss",
        ),
        "clipping": ("test_two_threads_step_what_one_agent_watches",),
    },
    "the test looks at tensors by numpy, or compares to the last bit what other buckets were summed for": {
        "traps": (
            "test_transposed_and_grouped_convolutions",
            "test_packed_weights_of_one_column_are_one_unit_and_cost_no_memory",
        ),
        "clipping": ("test_a_norm_beyond_float32_is_clipped_all_the_same", "test_groups_have_thresholds_of_their_own"),
    },
    "docs/agent.md: no float64 off the CPU, so that squares below float32 vanish and units are counted": {
        "traps": (
            "test_nonfinite_elements_are_counted_exactly",
            "test_vanishing_below_what_float32_can_square",
            "test_a_large_gradient_that_float32_cannot_square",
        ),
    },
    "docs/agent.md: other sizes off the CPU, a sample one step after a sign, no module without a wait": {
        "traps": ("test_update_norm_of_a_large_parameter_comes_now_and_then",),
        "clip_grad": ("test_the_first_bad_step_is_sampled_even_if_none_was_due",),
        "resting_weights": ("test_large_frozen_weights_are_read_in_turn",),
        "origin": (
            "test_bad_data_is_laid_at_the_first_layers_door",
            "test_zero_by_zero_between_two_layers",
            "test_a_loss_that_is_bad_by_itself",
            "test_tensors_that_hooks_hand_out_once_are_left_to_the_backward_pass",
            "test_functions_in_python_are_read_like_operators",
        ),
    },
}
"""Why -> module -> tests that the accelerator leaves out."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run on the accelerator; a name that no test has any more is an error."""
    collected = {item.path.stem.removeprefix("test_") for item in items}
    left_out = {
        (module, test)
        for modules in LEFT_OUT.values()
        for module, tests in modules.items()
        if module in collected
        for test in tests
    }
    found = [(item.path.stem.removeprefix("test_"), item.name.partition("[")[0]) for item in items]
    if stale := left_out - set(found):
        raise pytest.UsageError(f"left out, and no test: {sorted(stale)}")
    config.hook.pytest_deselected(items=[item for item, name in zip(items, found, strict=True) if name in left_out])
    items[:] = [item for item, name in zip(items, found, strict=True) if name not in left_out]


@pytest.fixture(autouse=True)
def _on_accelerator() -> Iterator[None]:
    accelerator = accelerator_of_process()
    accelerator.reset()
    accelerator.change(latency_seconds=LAG_SECONDS)
    with torch.device("sim:0"):
        yield
    accelerator.reset()
