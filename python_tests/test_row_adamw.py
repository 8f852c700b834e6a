"""AdamW of single rows, against torch's AdamW on each row alone."""

import copy

import pytest
import torch

from pcl_ext.row_adamw import RowAdamW

SETTINGS = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}
ROWS = [[0, 1, 2, 3, 4], [1, 3], [], [4, 1], [0]]  # what each step touches


def sparse(rows, gradient, size):
    """The rows of a gradient [n, D] that a step touches."""
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), gradient[rows], size, check_invariants=True)


@pytest.mark.parametrize("steps", [ROWS, [[0, 1, 2, 3, 4]] * 4], ids=["some", "all"])
def test_each_row_sees_adamw_of_its_own_steps(steps):
    table = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    alone = [torch.nn.Parameter(row.detach().clone()[None]) for row in table]
    ours = RowAdamW([table], **SETTINGS)
    theirs = [torch.optim.AdamW([row], **SETTINGS) for row in alone]
    for rows in steps:
        gradient = torch.randn(5, 3, dtype=torch.float64)
        table.grad = sparse(rows, gradient, table.shape)
        ours.step()
        for row in rows:
            alone[row].grad = gradient[row][None]
            theirs[row].step()
    torch.testing.assert_close(table.detach(), torch.cat([row.detach() for row in alone]))


def test_a_loaded_state_lies_beside_its_rows():
    table = torch.nn.Parameter(torch.zeros(5, 3))
    saved = RowAdamW([table], **SETTINGS)
    table.grad = sparse([1, 3], torch.ones(5, 3), table.shape)
    saved.step()
    elsewhere = torch.nn.Parameter(torch.zeros(5, 3, device="meta"))  # as a GPU is, which a file's tensors are not on
    loaded = RowAdamW([elsewhere], **SETTINGS)
    loaded.load_state_dict(saved.state_dict())
    assert {key: value.device.type for key, value in loaded.state[elsewhere].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_dense_gradients_are_torchs_adamw_bit_for_bit():
    parameters = [torch.nn.Parameter(torch.randn(4, 2)), torch.nn.Parameter(torch.randn(3))]
    twins = copy.deepcopy(parameters)
    optimizers = RowAdamW(parameters, **SETTINGS), torch.optim.AdamW(twins, **SETTINGS)
    for _ in range(3):
        for parameter, twin in zip(parameters, twins):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(parameters, twins))


def test_a_state_that_is_loaded_goes_on_with_the_same_bits():
    table, bias = torch.nn.Parameter(torch.randn(6, 2)), torch.nn.Parameter(torch.randn(6))
    gradients = [(sparse(rows, torch.randn(6, 2), (6, 2)), torch.randn(6)) for rows in ROWS]

    def run(parameters, optimizer, steps):
        for gradient in steps:
            for parameter, value in zip(parameters, gradient):
                parameter.grad = value
            optimizer.step()

    optimizer = RowAdamW([table, bias], **SETTINGS)
    run([table, bias], optimizer, gradients[:2])
    others = copy.deepcopy([table, bias])
    again = RowAdamW(others, **SETTINGS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run([table, bias], optimizer, gradients[2:])
    run(others, again, gradients[2:])
    assert torch.equal(table, others[0])
    assert torch.equal(bias, others[1])


def test_rows_that_are_all_there_are_torchs_adamw_in_double():
    table = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    dense = torch.nn.Parameter(table.detach().clone())
    ours, theirs = RowAdamW([table], lr=1e-2), torch.optim.AdamW([dense], lr=1e-2)
    for _ in range(20):
        dense.grad = torch.randn(5, 3, dtype=torch.float64)
        table.grad = sparse([0, 1, 2, 3, 4], dense.grad, table.shape)
        ours.step()
        theirs.step()
    torch.testing.assert_close(table, dense, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("option", ["maximize", "amsgrad", "capturable", "differentiable", "fused"])
def test_options_that_rows_do_not_have_are_refused(option):
    with pytest.raises(ValueError, match=f"RowAdamW takes no {option}"):
        RowAdamW([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **{option: True})


def test_a_closure_gives_the_loss_and_hooks_run_once():
    table = torch.nn.Parameter(torch.ones(5, 3))
    torch.optim.AdamW([table])  # its class is hooked from now on
    optimizer, calls = RowAdamW([table], **SETTINGS), []
    optimizer.register_step_post_hook(lambda *args: calls.append(None))

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.embedding(torch.tensor([1, 3]), table, sparse=True).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    assert len(calls) == 1
    assert (table[[1, 3]] < 1).all()
    assert (table[[0, 2, 4]] == 1).all()


def test_sparse_gradients_stay_sparse():
    table = torch.nn.Parameter(torch.zeros(5, 3))
    optimizer = RowAdamW([table], **SETTINGS)
    table.grad = sparse([1], torch.ones(5, 3), table.shape)
    optimizer.step()
    table.grad = torch.ones(5, 3)
    with pytest.raises(ValueError, match="a parameter of sparse gradients has a dense one"):
        optimizer.step()


def test_a_step_leaves_the_gradients_where_they_are():
    table, bias = torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(5))
    optimizer = RowAdamW([table, bias], **SETTINGS)
    table.grad, bias.grad = sparse([1], torch.ones(5, 3), table.shape), torch.ones(5)
    kept = table.grad, bias.grad
    optimizer.step()
    assert table.grad is kept[0]
    assert bias.grad is kept[1]


def test_steps_of_a_table_in_half_precision_are_counted_past_2048():
    table = torch.nn.Parameter(torch.zeros(5, 3, dtype=torch.float16))
    optimizer = RowAdamW([table], **SETTINGS)
    table.grad = sparse([1], torch.ones(5, 3, dtype=torch.float16), table.shape)
    optimizer.step()
    optimizer.state[table]["step"][1] = 2048
    optimizer.step()
    assert optimizer.state[table]["step"][:, 0].tolist() == [0, 2049, 0, 0, 0]
