"""The matrix families against textbook matrices built from the same weights; their parameters and FLOPs."""

import math

import pytest
import torch
from compare import assert_same, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from structured import BTT, MLBTC, MLR, BadInput, LowRank, mlbtc, reference
from structured.layers import BlockDiagonal, cap_norm


def factors(matrix):
    """The stored weights of every level's block-diagonal factors, right to left."""
    return [[step.weight for step in chain if isinstance(step, BlockDiagonal)] for chain in matrix.levels]


def block_diag(blocks):
    return torch.block_diag(*blocks)


def textbook_low_rank(m):
    ((right, left),) = factors(m)
    return (right[0] @ left[0]).T


def textbook_blocks(m):
    return sum(block_diag([(r @ l).T for r, l in zip(right, left, strict=True)]) for right, left in factors(m))


def textbook_btt(m, rank=1):
    ((right, left),) = factors(m)
    return reference.btt_dense(right, left, 1, rank)[0]


def textbook_monarch(m):
    """P^T L P R: permute, multiply by square diagonal blocks, permute back."""
    ((right, left),) = factors(m)
    c, d = right.shape[:2]
    assert right.shape == (c, d, d)
    assert left.shape == (d, c, c)
    P = torch.zeros(c * d, c * d, dtype=right.dtype)
    for i in range(c):
        for j in range(d):
            P[j * c + i, i * d + j] = 1
    return P.T @ block_diag(list(left.mT)) @ P @ block_diag(list(right.mT))


def textbook_kronecker(m):
    ((b, a),) = factors(m)
    return torch.kron(a[0].T.contiguous(), b[0].T.contiguous())


def textbook_butterfly(m):
    """B_k ... B_1: factor i mixes the pairs of positions that differ in bit i - 1 alone, each by a block of its own."""
    n = m.n_in
    total = torch.eye(n, dtype=torch.float64)
    twiddles = butterfly_twiddles(m)
    for bit in range(int(math.log2(n))):
        factor = torch.zeros(n, n, dtype=torch.float64)
        for low in range(n):
            if not low >> bit & 1:
                high = low | 1 << bit
                factor[[[low], [high]], [[low, high]]] = twiddles[bit, low]
        total = factor @ total
    return total


def butterfly_twiddles(m):
    """(bit, low position) -> 2 x 2 block (out, in), by following where the stages find every position."""
    where = torch.arange(m.n_in)  # which position each slot of the chain holds
    found = {}
    for step in m.levels[0]:
        if isinstance(step, BlockDiagonal):
            pairs = where.view(-1, 2)
            for block, (low, high) in zip(step.weight, pairs.tolist(), strict=True):
                bit = (low ^ high).bit_length() - 1
                assert low ^ high == 1 << bit, "a block mixes positions that differ in one bit"
                found[bit, low] = block.T
        else:
            where = where.view(*step.grid).transpose(1, 2).reshape(-1)
    assert torch.equal(where, torch.arange(m.n_in)), "the permutations undo each other"
    return found


CASES = [
    *[(mlbtc.dense, a, lambda m: factors(m)[0][0][0].T) for a in [(1, 1), (5, 3), (16, 16)]],
    *[(mlbtc.low_rank, a, textbook_low_rank) for a in [(1, 1, 1), (7, 5, 3), (5, 7, 9), (64, 64, 8)]],
    *[(mlbtc.block_low_rank, a, textbook_blocks) for a in
      [(6, 9, 3, 2), (10, 5, 5, 1), (16, 16, 1, 3), (24, 24, 4, 6)]],
    *[(mlbtc.mlr, a, textbook_blocks) for a in
      [(8, 8, (2, 1, 1)), (12, 20, (3, 2, 5)), (16, 16, (0, 2, 0, 1)), (7, 3, (2,))]],
    *[(mlbtc.btt, a, lambda m: textbook_btt(m, m.rank)) for a in
      [(12, 12, 1), (12, 20, 3), (64, 64, 2), (7, 7, 2), (6, 1, 2), (1, 6, 1), (128, 96, 1)]],
    *[(mlbtc.monarch, (n,), textbook_monarch) for n in (4, 6, 16, 24, 30, 36, 128)],
    *[(mlbtc.kronecker, a, textbook_kronecker) for a in
      [((2, 3), (4, 5)), ((3, 3), (2, 2)), ((1, 4), (5, 1)), ((8, 8), (8, 8))]],
    *[(mlbtc.butterfly, (n,), textbook_butterfly) for n in (2, 4, 8, 16, 32, 64, 128)],
]  # fmt: skip


@pytest.mark.parametrize(("build", "sizes", "textbook"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_family_equals_its_textbook_matrix(build, sizes, textbook):
    torch.manual_seed(0)
    m = build(*sizes).double()
    assert textbook(m).shape == (m.n_out, m.n_in)
    assert_same([m.dense()], [textbook(m)], ["dense"])
    for rows in ((2, 3), (4, m.n_in)):  # few: factor by factor; many: assembled, on the CPU
        x = torch.randn(*rows, m.n_in, dtype=torch.float64, requires_grad=True)
        inputs = {"x": x, **dict(m.named_parameters())}

        def product(f, x=x, inputs=inputs):
            out = f(x)
            cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
            return [out, *torch.autograd.grad(out, inputs.values(), cotangent)]

        names = ["Mx", *(f"d {name}" for name in inputs)]
        assert_same(product(m), product(lambda x: x @ textbook(m).T), names)


def test_a_random_butterfly_is_dense_and_a_fourier_matrix_is_one():
    """Every entry of the product is reached, and the Hadamard matrix comes out of +-1 blocks."""
    m = mlbtc.butterfly(16).double()
    assert (m.dense() != 0).all()
    for step in m.levels[0]:
        if isinstance(step, BlockDiagonal):
            step.weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double().expand_as(step.weight).clone()
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert_same([m.dense()], [H], ["Hadamard"])


def test_heads_are_independent_matrices():
    torch.manual_seed(0)
    m = BTT(12, 20, 2, n_head=3).double()
    right, left = factors(m)[0]
    M = reference.btt_dense(right, left, 3, 2)
    assert_same([m.dense()], [M], ["dense"])
    for rows in (10, 100):
        x = torch.randn(rows // 2, 2, 12, dtype=torch.float64)
        assert_same([m(x)], [torch.einsum("hoi,tbi->tbho", M, x)], ["Mx"])


@pytest.mark.parametrize("family", mlbtc.FAMILIES)
def test_every_head_of_every_family_is_that_family(family):
    """A head cut out of a matrix of several heads equals the single matrix with that head's weights."""
    sizes = dict(
        dense=(8, 8), low_rank=(8, 8, 3), block_low_rank=(8, 8, 2, 3), mlr=(8, 8, (2, 1)), btt=(8, 8, 2), monarch=(8,),
        kronecker=((2, 2), (4, 4)), butterfly=(8,),
    )[family]  # fmt: skip
    torch.manual_seed(0)
    many, one = (mlbtc.FAMILIES[family](*sizes, n_head=h).double() for h in (3, None))
    for h in range(3):
        for w_many, w_one in zip(factors(many), factors(one), strict=True):
            for i, (a, b) in enumerate(zip(w_many, w_one, strict=True)):
                b.data = (a.unflatten(-1, (3, -1))[:, :, h] if i == 0 else a.unflatten(0, (3, -1))[h]).clone()
        assert_same([many.dense()[h]], [one.dense()], [f"head {h}"])


def test_alphas_weigh_the_levels():
    torch.manual_seed(0)
    m = MLR(8, 8, (2, 1)).double()
    first, second = (block_diag([(r @ l).T for r, l in zip(*pair, strict=True)]) for pair in factors(m))
    m.alphas = (0.5, -2.0)
    assert_same([m.dense()], [0.5 * first - 2 * second], ["dense"])
    with pytest.raises(BadInput, match="3 alphas for 2 levels"):
        MLR(8, 8, (2, 1), alphas=(1, 2, 3))


def test_full_rank_btt_is_any_matrix():
    """With tt-rank min(d, a) a BTT of 6 x 6 has as many free numbers as it needs: it fits a random dense matrix."""
    torch.manual_seed(0)
    m = BTT(6, 6, 2).double()
    target = torch.randn(6, 6, dtype=torch.float64)
    options = dict(max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-16, history_size=50)
    optimizer = torch.optim.LBFGS(m.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = (m.dense() - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() < 1e-10
    assert torch.linalg.matrix_rank(BTT(64, 64, 1).double().dense()) == 64


@pytest.mark.parametrize(
    ("m", "params"),
    [
        (LowRank(48, 32, 4), 4 * (48 + 32)),
        (MLR(48, 32, (4, 2)), (4 + 2) * (48 + 32)),
        (BTT(64, 64, 3), 64 * (4 + 16) * 3),
        (mlbtc.monarch(64), 2 * 64**1.5),
        (mlbtc.kronecker((3, 4), (5, 6)), 12 + 30),
        (mlbtc.butterfly(64), 2 * 64 * 6),
        (mlbtc.dense(5, 3), 15),
    ],
    ids=str,
)
def test_parameters_and_flops(m, params):
    assert m.num_params == params
    with FlopCounterMode(display=False) as counter:
        m(torch.randn(7, m.n_in))
    assert counter.get_total_flops() == 7 * m.flops


def test_btt_splits_near_the_square_root():
    sizes = (1, 2, 7, 12, 16, 64, 96, 128, 256, 768)
    assert [mlbtc.split_near_sqrt(n) for n in sizes] == [
        (1, 1), (1, 2), (1, 7), (3, 4), (4, 4), (8, 8), (8, 12), (8, 16), (16, 16), (24, 32),
    ]  # fmt: skip
    assert [mlbtc.split_near_sqrt(n, above=True) for n in sizes] == [
        (1, 1), (1, 2), (1, 7), (3, 4), (2, 8), (4, 16), (8, 12), (8, 16), (8, 32), (24, 32),
    ]  # fmt: skip


def test_norm_cap():
    """A large weight is scaled down to the cap, a small one is left as it is; the gradient knows."""
    weight = torch.randn(4, 6, 10, dtype=torch.float64)
    cap = 6**0.5 / 6
    big = cap_norm(100 * weight)
    assert big.square().mean().sqrt().item() == pytest.approx(cap, rel=1e-6)
    small = 0.1 * weight
    assert torch.equal(cap_norm(small), small)
    for scale in (0.1, 5.0):
        got = with_gradients(cap_norm, [scale * weight])
        want = with_gradients(lambda w: reference.capped(w, 6, 10), [scale * weight])
        assert_same(got, want, ["W", "dW"])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MLBTC(10, 10, [mlbtc.level(10, 10, 3, 1, 2)]), "10 input features do not split into 3"),
        (lambda: MLBTC(10, 10, [mlbtc.level(10, 10, 1, 3, 2)]), "10 output features do not split into 3"),
        (lambda: mlbtc.level(10, 10, 5, 2, 3, True), "3 inner features do not split into 2"),
        (lambda: mlbtc.butterfly(12), "power of two from 2 on, not 12"),
        (lambda: MLR(8, 8, (0, 0)), "at least one level"),
        (lambda: MLR(6, 6, (2, 1, 1)), "6 input features do not split into 4"),
        (lambda: BTT(8, 8, 1)(torch.randn(3, 9)), "9 features, the matrix takes 8"),
    ],
)
def test_bad_sizes_say_what_is_wrong(build, words):
    with pytest.raises(BadInput, match=words):
        build()
