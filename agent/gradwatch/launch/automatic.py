"""Attaching without a word from the program: what ``gradwatch run`` sets up in each process that imports torch.

Nothing is hooked before the first backward pass: a hook on forward passes would be traced into compiled models, and
keep ``torch.compile`` from compiling them, make it compile again, or warn. What is trained is found then, among the
objects that are there.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from gradwatch.launch.trainings import Trainings


class Waiting:
    """Waits for the first backward pass, and attaches to what is trained then; again once an optimizer was made.

    It holds nothing of the program. Only then are objects searched for: any other backward pass pays for the look at a
    flag.
    """

    def __init__(self) -> None:
        self._due = True
        """Whether the next backward pass may be the first of a training that nobody watches."""
        self._retired = False
        self._made: list[weakref.ref[Optimizer]] = []
        """Optimizers that were made since a backward pass was looked at."""
        self._trainings: Trainings | None = None
        self._backward = torch.autograd.backward
        self._make = make = Optimizer.__init__

        @functools.wraps(make)
        def noted_make(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            make(optimizer, *args, **kwargs)
            self._made.append(weakref.ref(optimizer))
            self._due = True

        self._our_make = noted_make
        Optimizer.__init__ = noted_make  # type: ignore[method-assign,assignment]
        self._our_backward = self._backward
        self._wrap(self._watched_backward)

    def _wrap(self, watched: Callable[..., Any]) -> None:
        @functools.wraps(self._backward)
        def watched_backward(*args: Any, **kwargs: Any) -> Any:
            return watched(*args, **kwargs)

        if torch.autograd.backward is self._our_backward:
            torch.autograd.backward = self._our_backward = watched_backward

    def _watched_backward(self, *args: Any, **kwargs: Any) -> Any:
        if self._due and not self._retired and self._attach(args[0] if args else kwargs.get("tensors")):
            return torch.autograd.backward(*args, **kwargs)  # as the new agent hears it
        if self._trainings is not None and self._trainings.some_may_be_over:
            self._finish_idle()
        return self._backward(*args, **kwargs)

    def _attach(self, losses: Any) -> bool:
        """Attach to what is trained and not watched yet; return whether there was anything.

        Args:
            losses: what the backward pass is called with: a tensor or several.
        """
        self._due = False
        made, self._made = self._made, []
        try:
            trainings = self._trainings or self._begin()
            if not trainings.are_of_the_program:
                several = losses if isinstance(losses, list | tuple) else [losses]
                return trainings.attach(several, [known for reference in made if (known := reference()) is not None])
        except Exception as error:  # the program must not notice
            _say_why(error)
        self._retire()
        return False

    def _finish_idle(self) -> None:
        assert self._trainings is not None
        try:
            self._trainings.finish_idle()
        except Exception as error:  # the program must not notice
            _say_why(error)
            self._retire()

    def _begin(self) -> "Trainings":
        """Import what needs all of torch, and leave the compiler out from now on."""
        from gradwatch.hooks.taps import untraced
        from gradwatch.launch.trainings import Trainings

        self._wrap(untraced(self._watched_backward))
        self._trainings = Trainings()
        return self._trainings

    def _retire(self) -> None:
        """Look no more. Where somebody has wrapped ours meanwhile, it merely calls through."""
        self._retired = True
        if torch.autograd.backward is self._our_backward:
            torch.autograd.backward = self._backward
        if Optimizer.__init__ is self._our_make:
            Optimizer.__init__ = self._make  # type: ignore[method-assign]


def _say_why(error: Exception) -> None:
    sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")
