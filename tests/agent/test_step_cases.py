"""Which step a loss, a clipping, an optimizer belongs to: one table of events for each quirk of a framework."""

import pytest

from gradwatch.steps.core import CountSteps, Measure, StepCore
from gradwatch.steps.ownership import CASES, Adoption, Named, Owner, adoption_of
from gradwatch.steps.schedule import OverheadAccount, SamplingSchedule
from gradwatch.steps.state import MOST_CLIPS, MOST_LOSSES, NormClip

from .steps import HERE, Training

ELSEWHERE = 2


def test_a_plain_loop_has_a_step_for_each_optimizer_step() -> None:
    training = Training()
    for number in range(3):
        training.backward(f"loss {number}")
        training.clip()
        training.step()
    assert training.losses == [["loss 0"], ["loss 1"], ["loss 2"]]
    assert [record.step for record in training.ended] == [1, 2, 3]
    assert [len(record.clips) for record in training.ended] == [1, 1, 1]


def test_accumulated_losses_belong_to_the_step_that_follows() -> None:
    training = Training()
    for loss in ("first", "second", "third"):
        training.backward(loss)
    training.step()
    training.backward("fourth")
    training.step()
    assert training.losses == [["first", "second", "third"], ["fourth"]]


def test_more_losses_than_are_kept_are_summed() -> None:
    core = StepCore(0, SamplingSchedule(OverheadAccount(1, 0.01)), [1], thread=HERE, summed=lambda many: [sum(many)])
    for _ in range(MOST_LOSSES + 10):
        core.backward_began(HERE, [1])
        core.backward_ended(HERE, [1], frozenset({0}))
    assert sum(core.state.losses) == MOST_LOSSES + 10
    assert len(core.state.losses) < MOST_LOSSES


def test_several_named_optimizers_make_one_step_together() -> None:
    training = Training("AB", A=[0], B=[1])
    for loss in ("first", "second"):
        training.backward(loss)
        training.step("A")
        training.step("B")
    assert training.stepped == ["AB", "AB"]
    assert training.losses == [["first"], ["second"]]


def test_optimizers_that_nobody_named_are_learnt_from_the_first_step() -> None:
    training = Training(None, A=[0], B=[1])
    for _ in range(3):
        training.backward("loss")
        training.step("A")
        training.step("B")
    # The first step ends when A steps again; from then on B, the last one, ends each.
    assert training.stepped == ["AB", "AB", "AB"]


def test_trainings_in_turns_end_a_step_when_the_same_optimizer_steps_again() -> None:
    training = Training("AB", A=[0], B=[1])
    for optimizer in "AAB":
        training.backward(f"loss of {optimizer}", *training.parts[optimizer])
        training.step(optimizer)
    assert training.stepped == ["A", "AB"]


def test_an_optimizer_that_steps_seldom_is_not_waited_for_for_ever() -> None:
    training = Training("AB", A=[0], B=[1])
    training.step("A")
    training.step("B")
    for _ in range(250):
        training.step("A")
    assert training.core.expected.keys == [training.key("A")]
    assert training.ended[-1].step == training.core.state.number, "the last step ended with its only optimizer"


def test_an_optimizer_that_was_alone_for_long_is_waited_for_when_another_one_joins() -> None:
    training = Training("A", A=[0], B=[1])
    for _ in range(250):
        training.step("A")
    training.step("B")
    training.end()
    assert training.core.expected.keys == [training.key("A"), training.key("B")]


@pytest.mark.parametrize("inner_indices", [(0,), (0, 1)])
def test_the_step_of_an_inner_optimizer_belongs_to_the_outer_one(inner_indices: tuple[int, ...]) -> None:
    """As with ZeroRedundancyOptimizer and Lookahead."""
    training = Training("AB", A=[0, 1], B=inner_indices)
    training.backward("loss")
    training.begin("A")
    assert training.begin("B", outer="A").owner is Owner.OUTER
    training.made("A")
    training.end()
    assert training.stepped == ["A"]


def test_an_inner_optimizer_with_parameters_of_its_own_makes_a_step() -> None:
    training = Training("AB", A=[0], B=[0, 1])
    training.backward("loss")
    training.begin("A")
    assert training.begin("B", outer="A").owner is Owner.OPEN


def test_sam_steps_its_base_with_gradients_of_its_own() -> None:
    """Its closure was evaluated meanwhile: the base steps with other gradients than those that the step began with."""
    training = Training("AB", A=[0, 1], B=[0, 1])
    record = training.begin("A", closure=True).record
    training.backward("loss")
    training.core.closure_left()
    training.core.closure_returned(training.key("A"), record)
    assert training.begin("B", outer="A").owner is Owner.OPEN
    training.made("B")
    training.made("A")
    assert training.losses == [["loss"]]


def test_an_optimizer_made_anew_takes_the_place_of_the_one_that_is_gone() -> None:
    training = Training("A", A=[0, 1], B=[0, 1])
    training.step("A")
    training.core.optimizer_gone(training.key("A"))
    for _ in range(2):
        training.backward("loss")
        training.step("B")
    assert training.stepped == ["A", "B", "B"]


def test_a_closure_makes_the_loss_of_its_step() -> None:
    training = Training()
    record = training.begin("A", closure=True).record
    training.backward("first evaluation")
    training.core.closure_left()
    training.core.closure_returned(training.key("A"), record)
    training.backward("second evaluation")
    training.core.closure_left()
    training.core.closure_returned(training.key("A"), None)
    training.made("A")
    assert training.losses == [["first evaluation"]]
    training.backward("next")
    training.step()
    assert training.losses[1] == ["next"]


def test_a_clipping_within_a_closure_belongs_to_the_step_that_waits_for_it() -> None:
    training = Training()
    began = training.begin("A", closure=True)
    training.backward("loss")
    action = training.core.norm_clipped(NormClip("NaN", 1.0, frozenset({0, 1}), finite=False), [0, 1], measure=True)
    assert isinstance(action, Measure)
    assert action.record is began.record
    assert training.core.state.coming is None


def test_an_optimizer_that_does_not_call_its_closure_is_told_of() -> None:
    training = Training()
    training.backward("made before")
    training.begin("A", closure=True)
    made = training.core.step_made(training.key("A"))
    assert (made.ended, made.without_closure) == (True, True)
    training.end()
    assert training.losses == [["made before"]]


def test_an_optimizer_in_the_backward_pass_claims_the_loss_under_way() -> None:
    """As with optimizers that step in a hook as soon as a gradient is there."""
    training = Training("AB", A=[0], B=[1])
    training.backward("loss", during=lambda: (training.step("B"), training.step("A")))
    training.end()
    assert training.losses == [["loss"]]
    assert not training.core.state.losses


def test_a_pass_within_a_pass_does_not_lose_the_outer_loss() -> None:
    """As with gradient penalties and reentrant checkpointing."""
    training = Training()
    training.backward("outer", during=lambda: training.backward("inner"))
    training.step()
    assert training.losses == [["inner", "outer"]]


def test_a_failed_pass_leaves_no_loss() -> None:
    training = Training()
    training.core.backward_began(HERE, ["failed"])
    training.core.backward_ended(HERE, ["failed"], None)
    training.backward("good")
    training.step()
    assert training.losses == [["good"]]
    assert not training.core.state.under_way


def test_a_loss_scaler_that_found_inf_skips_the_step() -> None:
    training = Training()
    training.backward("overflowed")
    training.skip()
    training.backward("good")
    training.step()
    training.skip()  # it has stepped: nothing was skipped
    assert [(record.skipped, record.sampled) for record in training.ended] == [(True, False), (False, True)]
    assert training.losses == [["overflowed"], ["good"]]


def test_a_resumed_training_asks_how_many_steps_were_made_before_its_first() -> None:
    core = StepCore(0, SamplingSchedule(OverheadAccount(1, 0.01)), [1], number_is_open=True, thread=HERE)
    assert isinstance(core.step_began(1, frozenset({0}), HERE, 0.0), CountSteps)
    core.steps_counted(41)
    core.step_began(1, frozenset({0}), HERE, 0.0)
    assert core.state.number == 42


def test_clearing_gradients_after_a_clipping_forgets_it() -> None:
    training = Training()
    training.backward("thrown away")
    training.clip()
    training.core.gradients_cleared(frozenset({0, 1}))
    training.core.losses_dropped()
    training.backward("kept")
    training.step()
    assert training.losses == [["kept"]]
    assert not training.ended[0].clips


def test_more_gradients_after_a_clipping_take_those_parameters_out_of_it() -> None:
    training = Training()
    training.backward("loss")
    clip = training.clip()
    training.backward("more", 1)
    assert clip.indices == {0}


def test_a_clipping_that_is_not_finite_is_measured_before_it_wipes_the_gradients_out() -> None:
    training = Training(every=1000)
    training.step()  # the first step is always sampled
    for _ in range(3):
        training.backward("loss")
        training.step()
    training.measured.clear()
    training.backward("loss")
    training.clip(finite=False, norm="NaN")
    assert training.measured == [("clip", frozenset({0, 1}))]
    training.step()
    assert training.ended[-1].sampled
    assert not training.ended[-1].finite


def test_what_was_measured_before_a_clipping_is_dropped_with_its_gradients() -> None:
    training = Training()
    training.backward("loss")
    training.clip(finite=False)
    coming = training.core.state.coming
    assert coming is not None
    training.core.gradients_changed(frozenset({0, 1}))
    assert training.core.state.dropped == [coming], "its buffers are to be taken back"


def test_a_second_optimizers_clipping_belongs_to_the_open_step() -> None:
    training = Training("AB", A=[0], B=[1])
    training.backward("loss")
    training.step("A")
    action = training.core.norm_clipped(NormClip("NaN", 1.0, frozenset({1}), finite=False), [1], measure=True)
    assert isinstance(action, Measure)
    assert action.record is training.core.state.open


def test_only_the_first_of_several_bad_steps_is_sampled_out_of_turn() -> None:
    training = Training(every=1000)
    for loss in ("good", "good", "bad", "bad", "bad"):
        training.backward(loss)
        training.step()
    assert [record.sampled for record in training.ended] == [True, False, True, False, False]


def test_the_oldest_of_too_many_clippings_are_forgotten() -> None:
    training = Training()
    for _ in range(MOST_CLIPS + 5):
        training.clip()
    assert len(training.core.state.clips) == MOST_CLIPS


@pytest.mark.parametrize(("others", "told_after"), [(0, 200), (30, 20)])
def test_passes_that_no_optimizer_follows_are_told_once(others: int, told_after: int) -> None:
    training = Training()
    for _ in range(others):
        training.core.other_stepped()
    told = []
    for number in range(1, 300):
        training.core.backward_began(HERE, ["loss"])
        if training.core.backward_ended(HERE, ["loss"], frozenset({0})) is not None:
            told.append(number)
    assert told == [told_after]


def test_an_optimizer_that_steps_on_another_thread_moves_the_training_there() -> None:
    training = Training()
    training.begin("A", thread=ELSEWHERE)
    assert training.core.state.thread == ELSEWHERE


def test_another_threads_loss_is_claimed_only_where_it_reaches_the_watched_parameters() -> None:
    training = Training()
    training.core.backward_began(ELSEWHERE, ["of another model"])
    training.backward("ours", during=training.step)
    training.core.backward_ended(ELSEWHERE, ["of another model"], None)
    assert training.losses == [["ours"]]


def test_numbers_that_are_logged_belong_to_the_next_step() -> None:
    training = Training()
    training.core.logged("accuracy", 0.5)
    training.core.logged("accuracy", 0.75)
    training.step()
    training.step()
    assert [record.logged for record in training.ended] == [{"accuracy": 0.75}, {}]


NAMED = [Named(1, gone=False, last=frozenset({0})), Named(2, gone=True, last=frozenset({1}))]


@pytest.mark.parametrize(
    ("stepped", "within", "around", "adoption", "replaced"),
    [
        ({0}, True, False, Adoption.WITHIN, None),
        ({1}, False, False, Adoption.REPLACES, 2),
        ({0}, False, True, Adoption.AROUND, None),
        ({0}, False, False, Adoption.STRANGER, None),
        (set(), False, False, Adoption.OTHER, None),
    ],
)
def test_an_optimizer_that_nobody_named_counts_where_it_stands_for_a_named_one(
    stepped: set[int], within: bool, around: bool, adoption: Adoption, replaced: int | None
) -> None:
    found = adoption_of(frozenset(stepped), NAMED, within_named=within, around_named=around)
    assert found == (adoption, replaced)


def test_where_all_named_optimizers_are_gone_any_new_one_takes_the_place_of_one() -> None:
    gone = [Named(1, gone=True, last=frozenset({7}))]
    assert adoption_of(frozenset({0}), gone, within_named=False, around_named=False) == (Adoption.REPLACES, 1)


def test_an_optimizer_of_parameters_that_came_later_counts_beside_the_named_ones() -> None:
    found = adoption_of(frozenset({5}), NAMED, within_named=False, around_named=False, found_later=True)
    assert found == (Adoption.LATER, None)


def test_each_case_of_ownership_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert CASES[-1].owner is Owner.NEW
