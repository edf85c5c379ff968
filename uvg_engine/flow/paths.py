"""The discrete mixture path and its exact quantities on vocabularies small enough to enumerate.

Letters: V vocabulary, L tokens. The engine needs none of these tables; tests and curious people do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from uvg_engine.flow.schedules import Kappa


@dataclass(frozen=True)
class MixturePath:
    """x_t = data token with probability kappa_t, else a source token; tokens move independently given the data.

    vocab: V. mask_id: the source token, or -1 for a source uniform over V. Source: Gat et al. 2024.
    """

    vocab: int
    kappa: Kappa = field(default_factory=Kappa)
    mask_id: int = -1

    def __post_init__(self) -> None:
        if self.vocab < 1:
            raise ValueError(f"vocab must be at least 1, got {self.vocab}")
        if not -1 <= self.mask_id < self.vocab:
            raise ValueError(f"mask_id must be -1 or in [0, {self.vocab}), got {self.mask_id}")

    def source(self) -> Tensor:
        """Probabilities [V] of one source token, fp64."""
        if self.mask_id == -1:
            return torch.full((self.vocab,), 1 / self.vocab, dtype=torch.float64)
        return torch.nn.functional.one_hot(torch.tensor(self.mask_id), self.vocab).double()

    def token_rows(self, t: float) -> Tensor:
        """[V, V]: row = data token, column = token at time t; each row sums to one."""
        share = float(self.kappa(torch.tensor(t, dtype=torch.float64)))
        return share * torch.eye(self.vocab, dtype=torch.float64) + (1 - share) * self.source()

    def marginal(self, data: Tensor, t: float) -> Tensor:
        """p_t of whole sequences. data: their fp64 probabilities, [V] * L. Returns the same shape."""
        out = data
        for axis in range(data.dim()):
            out = torch.tensordot(out, self.token_rows(t), dims=([axis], [0])).movedim(-1, axis)
        return out

    def posterior(self, data: Tensor, t: float) -> Tensor:
        """The perfect model: p(data token j = v | x_t) for every x_t.

        data: fp64 [V] * L. Returns [V] * L + [L, V]; sequences the path cannot reach get the data's own marginals.
        """
        states = _states(data.dim(), self.vocab)
        joint = data.flatten() * self.token_rows(t)[states[None], states[:, None]].prod(-1)  # [x_t, data]
        marginal = joint.sum(1, keepdim=True)
        belief = torch.where(marginal > 0, joint / marginal, data.flatten())
        out = torch.einsum("xd,djv->xjv", belief, torch.nn.functional.one_hot(states, self.vocab).to(belief.dtype))
        return out.reshape(*data.shape, *out.shape[1:])


def _states(length: int, vocab: int) -> Tensor:
    """Every sequence, the last token running fastest: [vocab**length, length]."""
    return torch.cartesian_prod(*[torch.arange(vocab)] * length).reshape(-1, length)


def transition_rows(tokens: Tensor, probs: Tensor, jump_prob: float | Tensor) -> Tensor:
    """Where one step takes each token: (1 - jump) * stay + jump * probs.

    tokens: int64 [...]. probs: [..., V], the model's. Returns [..., V]; rows sum to one.
    """
    stay = torch.nn.functional.one_hot(tokens, probs.shape[-1]).to(probs.dtype)
    return stay + jump_prob * (probs - stay)


def step_marginal(current: Tensor, posterior: Tensor, jump_prob: float) -> Tensor:
    """Push a distribution over sequences through one step of the sampler, every token by its own transition row.

    current: [V] * L. posterior: [V] * L + [L, V]. Returns [V] * L.
    """
    length, vocab = current.dim(), current.shape[0]
    states = _states(length, vocab)
    rows = transition_rows(states, posterior.reshape(len(states), length, vocab), jump_prob)
    reach = current.reshape(-1, 1)
    for j in range(length):
        reach = (reach[:, :, None] * rows[:, j][:, None, :]).flatten(1)
    return reach.sum(0).reshape(current.shape)
