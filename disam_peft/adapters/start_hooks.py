"""The hooks of an adapter that starts from the features of the training images; ``classification/fit_start.py`` calls
them.

Shapes in this file: M training images, V held-back images of the source domains, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class StartHooks:
    """What every adapter has from its base class, and few override: ``make_room``, ``fit_start``, ``tune``, in this
    order. None of them ever sees an image of the held-out domain."""

    def make_room(self, labels_M: Tensor, domains_M: Tensor) -> None:
        """Give tensors whose size depends on the training set that size.

        Called with the classes and domains of all M training images before an optimizer takes hold of the parameters,
        also in a run that is resumed. The same images must give the same size, and nothing may be drawn from torch's
        global generators. Not overridden: every tensor has its size from ``build`` on.
        """

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float] | None:
        """Set the initial weights from the training set, for example from a cache of features or a closed form.

        Called at most once, before step 1 of a fresh run, without a graph; never when a run is resumed, so whatever it
        sets must be in ``state``. It fills the existing parameters and buffers in place, because the optimizer may hold
        them already.

        Not overridden: training starts from what ``build`` made, and no features are computed.

        Args:
            features_ME: features of all M training images, in the order of the data set, as the image tower gives them:
                not normalised, before ``image_features``. At least float32, on the backbone's device.
            labels_M, domains_M: the class and the domain of each, int64, on the same device.

        Returns:
            Numbers that tell how it went, which are recorded and for which the start is validated; None: nothing.
        """
        return None

    def needs_tuning(self) -> bool:
        """Whether ``fit_start`` leaves settings open, for ``tune`` to choose."""
        return False

    def tune(
        self, features_VE: Tensor, labels_V: Tensor, domains_V: Tensor, zero_shot_VC: Tensor
    ) -> Mapping[str, float]:
        """Choose settings by V held-back images of the source domains. Called after ``fit_start`` where
        ``needs_tuning``, under the same conditions.

        Args:
            features_VE, labels_V, domains_V: as for ``fit_start``; the domains may be numbered in another way.
            zero_shot_VC: the logits of zero-shot classification for these images.

        Returns:
            What was chosen, which is recorded.
        """
        raise NotImplementedError(f"{type(self).__name__} needs tuning and does not say how")

    @classmethod
    def starts_from_features(cls) -> bool:
        """Whether this kind of adapter overrides ``fit_start``."""
        return cls.fit_start is not StartHooks.fit_start
