import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from anomalymatch.algorithms.fixmatch.module import ExponentialMovingAverage, FixMatch, FixMatchSpec
from anomalymatch.algorithms.fixmatch.weighting import Alignment, FixedThreshold, FlexMatch, FreeMatch, SoftMatch
from anomalymatch.algorithms.layer_groups import freeze_lower_groups

DEFAULTS = {
    "threshold": 0.6,
    "weighting": FixedThreshold,
    "alignment": None,
    "consistency": "cross_entropy",
    "rampup": 0.0,
    "layer_decay": 1.0,
    "unlabelled_weight": 1.0,
    "ema_decay": 0.9,
    "teacher": "student",
    "schedule": "constant",
    "weight_decay": 0.01,
    "freeze_batch_norm": True,
    "single_forward": False,
}
SIBLINGS = {
    "flexmatch": {"weighting": FlexMatch},
    "freematch": {"threshold": None, "weighting": partial(FreeMatch, momentum=0.9, fairness=0.5)},
    "softmatch": {"threshold": None, "weighting": partial(SoftMatch, momentum=0.5, n_sigma=2.0)},
    "meanteacher": {"threshold": None, "consistency": "squared_error", "teacher": "ema", "rampup": 0.5},
}
ALIGNED = {"alignment": partial(Alignment, prior=0.01, momentum=0.9)}
STEPS = 3


def spec(**changes):
    return FixMatchSpec(**DEFAULTS | changes)


def module_of(network, *, truth=None, lr=0.05, iterations=STEPS, **changes):
    module = FixMatch(
        copy.deepcopy(network),
        spec(**changes),
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
        iterations=iterations,
        truth=truth,
        pool=6,
    )
    module.logged = {}
    module.log_dict = lambda values: module.logged.update({k: float(v.detach()) for k, v in values.items()})
    module.train()
    module.on_train_start()
    return module


def train(module, batch, steps=STEPS):
    """Train as Lightning does, in a plain loop."""
    made = module.configure_optimizers()
    optimizer, scheduler = (
        (made["optimizer"], made["lr_scheduler"]["scheduler"]) if isinstance(made, dict) else (made, None)
    )
    for step in range(steps):
        optimizer.zero_grad()
        module.training_step(batch(step), step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        module.on_train_batch_end(None, None, step)
    return module


def slow_loss(network, data, threshold, weight):
    """Compute the losses image by image in plain Python; batch norms are frozen, so images are independent."""
    x_lb, y_lb, x_w, x_s, _ = data

    def probabilities(image):
        with torch.no_grad():
            a, b = network(image[None])[0].double().tolist()
        return [math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))]

    supervised = sum(-math.log(probabilities(x)[y]) for x, y in zip(x_lb, y_lb.tolist(), strict=True)) / len(x_lb)
    consistency, passed = 0.0, {}
    for i, (weak, strong) in enumerate(zip(x_w, x_s, strict=True)):
        belief = probabilities(weak)
        best = int(belief[1] > belief[0])
        if belief[best] >= threshold:
            passed[i] = best
            consistency -= math.log(probabilities(strong)[best])
    return supervised, consistency / len(x_w), passed


@pytest.mark.parametrize("single_forward", [True, False])
@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_the_loss_is_the_definition(opinionated, single_forward, teacher, batch):
    truth = torch.tensor([True, False, False, True, False, True])
    module = module_of(opinionated, truth=truth, single_forward=single_forward, teacher=teacher, unlabelled_weight=0.7)
    loss = module.training_step(batch(), 0).item()
    supervised, consistency, passed = slow_loss(module.network, batch(), 0.6, 0.7)
    anomalies = [i for i, best in passed.items() if best == 1]
    normals = [i for i, best in passed.items() if best == 0]
    right = [i for i, best in passed.items() if truth[i] == best]
    assert 0 < len(anomalies) < len(passed) < 6
    assert consistency > 0.01
    assert loss == pytest.approx(supervised + 0.7 * consistency, rel=1e-4)
    assert module.logged == pytest.approx(
        {
            "loss": supervised + 0.7 * consistency,
            "loss_lb": supervised,
            "loss_ulb": consistency,
            "pass_rate": len(passed) / 6,
            "pass_rate_anomaly": len(anomalies) / 6,
            "pass_rate_normal": len(normals) / 6,
            "pseudo_precision": len(right) / len(passed),
            "pseudo_precision_anomaly": len(set(right) & set(anomalies)) / len(anomalies),
            "pseudo_precision_normal": len(set(right) & set(normals)) / len(normals),
        },
        rel=1e-4,
    )


def test_one_forward_pass_or_two_train_the_same_network(opinionated, batch):
    single, separate = (train(module_of(opinionated, single_forward=flag), batch) for flag in (True, False))
    for a, b in zip(single.network.parameters(), separate.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_teacher_ema_makes_the_pseudo_labels_by_the_average(opinionated, batch):
    student, ema = (module_of(opinionated, teacher=teacher) for teacher in ("student", "ema"))
    for module in (student, ema):  # an average that believes the opposite
        module.ema.network.head.linear.weight.neg_()
        module.ema.network.head.linear.bias.neg_()
        module.training_step(batch(), 0)
    _, student_loss, _ = slow_loss(student.network, batch(), 0.6, 1.0)
    assert student.logged["loss_ulb"] == pytest.approx(student_loss, rel=1e-4)
    assert ema.logged["pass_rate"] == pytest.approx(student.logged["pass_rate"])
    wrong = student.logged["pass_rate"] - student.logged["pass_rate_anomaly"]
    assert ema.logged["pass_rate_anomaly"] == pytest.approx(wrong)
    assert ema.logged["loss_ulb"] != pytest.approx(student_loss, rel=0.05)


def test_no_gradient_flows_through_the_teacher(opinionated, batch):
    for single_forward in (True, False):
        module = module_of(opinionated, single_forward=single_forward)
        data = batch()
        weak = data.x_ulb_w.float().requires_grad_()
        data = data._replace(x_lb=data.x_lb.float(), x_ulb_w=weak, x_ulb_s=data.x_ulb_s.float())
        module.training_step(data, 0).backward()
        assert weak.grad is None or not weak.grad.any()
        assert module.network.head.linear.weight.grad.any()
        assert all(p.grad is None for p in module.ema.parameters())


def test_precision_is_not_a_number_where_nothing_passes(tiny_network, batch):
    module = module_of(tiny_network, truth=torch.zeros(6, dtype=torch.bool), threshold=0.999)
    module.training_step(batch(), 0)
    assert module.logged["pass_rate"] == 0.0
    assert math.isnan(module.logged["pseudo_precision"])
    assert math.isnan(module.logged["pseudo_precision_anomaly"])


def test_the_learning_rate_follows_the_schedule(opinionated):
    made = module_of(opinionated, schedule="cosine_7_16", lr=0.2, iterations=4).configure_optimizers()
    rates = []
    for _ in range(5):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.2 * math.cos(7 * math.pi * k / 64) for k in range(5)])
    assert made["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize("schedule", ["constant", "cosine_7_16"])
def test_lower_layers_learn_more_slowly_and_batch_norms_do_not_decay(opinionated, schedule):
    module = module_of(opinionated, schedule=schedule, lr=0.2, layer_decay=0.5, weight_decay=0.5)
    made = module.configure_optimizers()
    optimizer = made if schedule == "constant" else made["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    network = module.network
    assert rates[id(network.head.linear.weight)] == 0.2
    assert [rates[id(next(block.parameters()))] for block in network.backbone.body.blocks[-2:]] == [0.05, 0.1]
    norms = {id(p) for part in network.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()}
    for group in optimizer.param_groups:
        assert {0.0 if id(p) in norms else 0.5 for p in group["params"]} == {group["weight_decay"]}


def statistics(network):
    return {name: b.clone() for name, b in network.named_buffers() if "running" in name}


def test_frozen_batch_norms_keep_their_statistics_and_others_do_not(opinionated, batch):
    start = statistics(opinionated)
    frozen = train(module_of(opinionated), batch)
    assert all(torch.equal(value, start[name]) for name, value in statistics(frozen.network).items())
    moving = train(module_of(opinionated, freeze_batch_norm=False), batch)
    assert not any(torch.equal(value, start[name]) for name, value in statistics(moving.network).items())
    for name, value in statistics(moving.ema.network).items():
        assert torch.equal(value, statistics(moving.network)[name])


def test_frozen_layers_stay(opinionated, batch):
    freeze_lower_groups(opinionated.backbone.body, 1)
    module = train(module_of(opinionated), batch)
    after = dict(module.network.named_parameters())
    for name, parameter in opinionated.named_parameters():
        assert torch.equal(after[name], parameter) is not parameter.requires_grad, name


@pytest.mark.parametrize("freeze", [True, False])
def test_lightning_trains_it_as_the_plain_loop_does(opinionated, train_with_lightning, freeze, batch):
    module = FixMatch(
        copy.deepcopy(opinionated),
        spec(freeze_batch_norm=freeze, schedule="cosine_7_16", teacher="ema"),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        iterations=STEPS,
    )
    modes = train_with_lightning(module, [batch(step) for step in range(STEPS)], module.network)
    plain = train(module_of(opinionated, freeze_batch_norm=freeze, schedule="cosine_7_16", teacher="ema"), batch)
    for a, b in zip(module.ema.network.parameters(), plain.ema.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert modes == {(True, not freeze)}


# --- its siblings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_loss_of_a_variant_is_the_sum_of_its_terms(opinionated, name, batch):
    """Compute each term from the weighting of the plain logits; batch norms are frozen."""
    module = module_of(opinionated, unlabelled_weight=0.7, **SIBLINGS[name])
    made = module.spec.make_weighting(6)
    x_lb, y_lb, x_w, x_s, i_ulb = batch()
    with torch.no_grad():
        weak, strong, labelled = (module.network(x) for x in (x_w, x_s, x_lb))
    targets, mask = made(weak, i_ulb)
    if name == "meanteacher":
        losses = (weak.softmax(1) - strong.softmax(1))[:, 1].square().tolist()  # of two classes, both differ alike
        assert torch.equal(mask, torch.ones(6, dtype=torch.bool))
    else:
        rows = zip(strong.softmax(1).tolist(), targets.tolist(), mask.tolist(), strict=True)
        losses = [-math.log(row[target]) * weight for row, target, weight in rows]
    assert max(losses) > 0.01
    factor = 0.7 * (math.exp(-5) if name == "meanteacher" else 1.0)
    expected = torch.nn.functional.cross_entropy(labelled, y_lb).item() + factor * sum(losses) / 6
    if name == "freematch":
        made = module.spec.make_weighting(6)
        penalty = made.penalty(strong, made(weak, i_ulb)).item()
        assert penalty < -0.01
        expected += penalty
    assert module.training_step(batch(), 0).item() == pytest.approx(expected, rel=1e-4)
    assert module.logged["loss"] == pytest.approx(expected, rel=1e-4)
    for key, value in made.state_to_log.items():
        assert module.logged[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    assert bool(made.state_to_log) == (name != "meanteacher")
    assert ("loss_penalty" in module.logged) == (name == "freematch")


def test_the_ramp_rises_over_its_share_of_the_training(opinionated, batch):
    module = module_of(opinionated, iterations=8, rampup=0.5, unlabelled_weight=2.0)
    for step, factor in enumerate([math.exp(-5 * (1 - step / 4) ** 2) for step in range(4)] + [1.0, 1.0]):
        loss = module.training_step(batch(), step).item()
        assert loss == pytest.approx(module.logged["loss_lb"] + 2 * factor * module.logged["loss_ulb"], rel=1e-5)


@pytest.mark.parametrize("name", SIBLINGS)
def test_state_dict_and_pickle_restore_a_module(opinionated, name, batch):
    """A spawned process gets and returns it so, with its adaptive state."""
    module = train(module_of(opinionated, **SIBLINGS[name], **ALIGNED), batch)
    other = module_of(opinionated, **SIBLINGS[name], **ALIGNED)
    other.load_state_dict(module.state_dict())
    del module.log_dict
    again = pickle.loads(pickle.dumps(module))
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    again.logged, again.log_dict = {}, lambda values: again.logged.update({k: float(v) for k, v in values.items()})
    for restored in (other, again):
        restored.training_step(batch(7), STEPS)
    assert other.logged == pytest.approx(again.logged, nan_ok=True)
    kept = [key for key in module.state_dict() if key.startswith("weighting.")]
    assert bool(kept) == (name != "meanteacher")


# --- moving average ---------------------------------------------------------------------------------------------


def small_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_parameters_are_averaged_by_hand_and_frozen_ones_skipped():
    student = small_network()
    fill(student, 1.0)
    ema = ExponentialMovingAverage(student, 0.75)
    for value, expected in ((3.0, 1.5), (3.0, 1.875), (-1.0, 1.15625)):
        fill(student, value)
        ema.update(student)
        assert {p.unique().item() for p in ema.network.parameters()} == {expected}
    assert {p.unique().item() for p in student.parameters()} == {-1.0}
    student[0].requires_grad_(False)
    fill(student, 9.0)
    ema.update(student)
    assert [ema.network[layer].weight.unique().item() for layer in (0, 1)] == [1.15625, 0.75 * 1.15625 + 0.25 * 9]
    student.requires_grad_(False)
    ema.update(student)  # nothing learns: nothing to do
    assert ema.network[1].weight.unique().item() == 0.75 * 1.15625 + 0.25 * 9


def test_the_average_starts_as_a_copy_and_copies_buffers():
    student = small_network()
    ema = ExponentialMovingAverage(student, 0.99)
    for own, copied in zip(student.state_dict().values(), ema.network.state_dict().values(), strict=True):
        assert torch.equal(own, copied)
        assert own.data_ptr() != copied.data_ptr()
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert all(p.requires_grad for p in student.parameters())
    student(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    ema.update(student)
    assert ema.network[1].num_batches_tracked.item() == 1
    assert torch.equal(ema.network[1].running_mean, student[1].running_mean)
    assert ema.network[1].running_mean.any()


def test_the_average_stays_in_evaluation_mode():
    student = small_network()
    ema = ExponentialMovingAverage(student, 0.9)
    nn.ModuleDict({"student": student, "ema": ema}).train()
    assert student.training
    assert not any(module.training for module in ema.modules())
