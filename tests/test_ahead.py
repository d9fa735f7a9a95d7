"""lib/ahead.py and lib/clock.py: what a training says of what is ahead, and of how far it is."""

import io
import sys
from pathlib import Path

import train as train_py
from lib import ahead, clock, runtime, settings
from model import GPT, GPTConfig

import pytest
import torch
from conftest import rows


class Time:
    """A clock of the tests' own, in seconds."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(clock.time, "perf_counter", self.read)
        monkeypatch.setattr(clock.time, "monotonic", self.read)

    def read(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


def settings_of(**more):
    return train_py.Settings(**dict(warmup_iters=10, eval_interval=500) | more)


@pytest.mark.parametrize(
    ("more", "max_iters", "steps_per_epoch", "says"),
    [
        ({}, 1000, 100, []),
        ({}, 1000, 0.25, ["a step reads more than the whole train split, 4.0 times it"]),
        ({}, 1000, 9, ["the run reads the train split 111 times"]),
        ({"warmup_iters": 2000}, 200, 100, ["--warmup_iters=10"]),
        ({"sample_tokens": 9, "eval_interval": 0}, 200, 100, ["eval_interval=0 makes none; set one"]),
        ({"sample_tokens": 9}, 200, 100, []),
        ({"eval_interval": 0}, 5000, 100, ["--save_interval=1000 keeps some"]),
        ({"eval_interval": 5000, "save_interval": 6000}, 5000, 100, ["--save_interval=1000 keeps some"]),
        ({"eval_interval": 0, "save_interval": 4999}, 5000, 100, []),
        ({"eval_interval": 0, "save_epochs": 1}, 5000, 100, []),
        ({"eval_interval": 0}, 1000, 100, []),
        ({"warmup_iters": 150, "lr_decay_iters": 100}, 200, 100, ["--warmup_iters=5"]),
        ({"warmup_iters": 150, "lr_decay_iters": 100, "decay_lr": False}, 200, 100, []),
        ({"warmup_iters": 2000}, 2000, 100, ["--warmup_iters=100"]),
        ({"warmup_iters": 2000}, 2001, 100, []),
        ({"warmup_iters": 2000, "decay_lr": False}, 2000, 100, []),
        ({"warmup_iters": 2000}, 0, 100, []),  # of a length that is not known
    ],
)
def test_settings_that_do_not_fit_each_other_are_warned_of(more, max_iters, steps_per_epoch, says):
    lines = ahead.warnings(settings_of(**more), max_iters, steps_per_epoch)
    assert len(lines) == len(says)
    for line, part in zip(lines, says, strict=True):
        assert line.startswith("warning: ") and part in line


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.012 seconds"),
        (5, "5 seconds"),
        (90, "90 seconds"),
        (600, "10.0 minutes"),
        (9000, "2.5 hours"),
        (864000, "10.0 days"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds, said):
    assert clock.duration(seconds) == said


def test_the_first_step_says_how_long_all_take_if_that_is_long(time, capsys):
    watch = clock.Clock(runtime.choose("cpu"))
    for seconds in (30.0, 20.0):
        watch.begin_step(steps=1000)
        time.now += seconds
        watch.end_step()
    assert capsys.readouterr().out == "a step takes 30 seconds, all take about 8.3 hours\n"
    assert watch.lap() == 25.0 and watch.left(10) == 250.0
    watch.begin_step(steps=998)
    time.now += 5
    watch.end_step()
    assert watch.lap() == 5.0 and watch.left(10) == 150.0  # the median of the laps
    quick = clock.Clock(runtime.choose("cpu"))
    quick.begin_step(steps=100)
    time.now += 0.01
    quick.end_step()
    assert capsys.readouterr().out == ""


def first_step(time, steps, micro_batches, seconds):
    """The first of so many steps, each of whose micro-batches takes so long."""
    watch = clock.Clock(runtime.choose("cpu"))
    watch.begin_step(steps)
    for i in range(micro_batches):
        watch.at_micro_batch(1, i, micro_batches)
        time.now += seconds
    watch.end_step()


def test_a_first_step_that_is_long_says_after_some_micro_batches_how_long_all_take(time, capsys):
    first_step(time, steps=600_000, micro_batches=40, seconds=80.0)
    out = capsys.readouterr().out
    assert out.startswith("a step takes 53.3 minutes, all take about 22,222.2 days; a GPU, a smaller model")
    assert len(out.splitlines()) == 1


def parts(watch, time, seconds, count=5):
    """Something of so many parts that take so long each."""
    for i in range(count):
        watch.at("step 7, micro-batch", i, count)
        time.now += seconds
    watch.at("step 7, micro-batch", count, count)


def test_a_long_step_says_every_minute_how_far_it_is_in_a_log_file(time, capsys):
    parts(clock.Clock(runtime.choose("cpu")), time, seconds=40.0)
    assert capsys.readouterr().err == "step 7, micro-batch 2 of 5\nstep 7, micro-batch 4 of 5\n"
    parts(clock.Clock(runtime.choose("cpu")), time, seconds=10.0)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_long_step_has_a_bar_on_a_terminal_that_goes_at_its_end(time, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    parts(clock.Clock(runtime.choose("cpu")), time, seconds=2.0)
    shown = sys.stderr.getvalue().split("\r")
    assert "step 7, micro-batch [########            ] 2 of 5 " in "".join(shown) and "1 of 5" not in "".join(shown)
    assert shown[-2].strip() == "" and len(shown[-2]) > 40 and shown[-1] == ""


def test_the_end_of_a_step_takes_its_bar_away(time, monkeypatch):
    """A step ends after its last micro-batch, of which no more is said."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    first_step(time, steps=2, micro_batches=3, seconds=4.0)
    shown = sys.stderr.getvalue().split("\r")
    assert "2 of 3" in sys.stderr.getvalue() and shown[-1] == "" and not shown[-2].strip()


def test_a_line_takes_the_place_of_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    settings.show_bar("1 of 2 ")
    settings.say("a line", file=sys.stderr)
    settings.say("another", file=sys.stderr)
    assert sys.stderr.getvalue() == "1 of 2 \r       \ra line\nanother\n"


def test_only_the_first_process_says_how_far_it_is(time, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts(clock.Clock(runtime.choose("cpu")), time, seconds=40.0)
    assert capsys.readouterr().err == ""


def test_max_iters_0_is_an_estimate_that_writes_nothing(train):
    status, out, err = train("--out_dir=out/a", "--max_iters=0")
    assert status == 0, err
    assert "a step takes about" in out and "an epoch" in out and "the whole" in out and not Path("out").exists()
    assert "an epoch, 12 steps" in out  # of the command without its --max_iters=0
    out = train("--out_dir=out/a", "--max_iters=0", "--max_epochs=2")[1]
    assert "by max_epochs=2" in out and "the whole" in out and not Path("out").exists()
    train("--out_dir=out/a", "--max_iters=4")  # A run that is there is not looked at.
    before = {path.name: path.read_bytes() for path in Path("out/a").iterdir()}
    assert "resuming" not in train("--out_dir=out/a", "--max_iters=0")[1]
    assert {path.name: path.read_bytes() for path in Path("out/a").iterdir()} == before


def test_what_is_ahead_is_said_before_a_run_begins(train):
    out = train("--out_dir=out/a", "--warmup_iters=50")[1].partition("step 0")[0]
    assert "68.9 steps an epoch, 12 steps" in out and "GFLOP a token, about" in out and "GB" in out
    assert "warning: the warm-up of 50 steps is no shorter than the run of 12" in out
    assert len(rows("out/a")) == 13


class SlowSGD(torch.optim.SGD):
    """An optimizer whose step takes 3 seconds, and the first one a minute."""

    def __init__(self, time):
        super().__init__([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        self.time, self.seconds = time, iter([60.0, 3.0])
        self.param_groups[0]["params"][0].grad = torch.ones(2)

    def step(self):
        self.time.now += next(self.seconds)
        super().step()


@pytest.mark.parametrize(("accumulation", "count"), [(1, 6), (8, 9), (1000, 13)])
def test_an_estimate_is_of_the_median_micro_batch_and_of_an_optimizer_s_step(time, accumulation, count):
    """The first one, which warms up, does not count, and one that another program disturbs hardly does."""
    seconds = iter([9.0, 0.1, 0.1, 0.7, *[0.1] * 20])

    def micro_step(x, y):
        time.now += next(seconds)
        return torch.zeros(())

    batches = ((i, None, None) for i in range(100))
    limit = 10.75  # seconds: those of twelve, and a part of one more
    optimizer, watch = SlowSGD(time), clock.Clock(runtime.choose("cpu"))
    line = ahead.estimate(micro_step, batches, accumulation, optimizer, 3, 2, watch, limit)
    assert line.startswith(f"a step takes about {clock.duration(0.1 * accumulation + 3)}, an epoch")
    assert next(batches)[0] == count and optimizer.param_groups[0]["params"][0].tolist() == [1.0, 1.0]


def test_an_estimate_warns_of_the_run_that_is_configured(train):
    Path("config.py").write_text("max_iters = 30\nwarmup_iters = 50\n")
    for args in (["--max_iters=0"], ["--max_iters=30", "--max-iters=0"]):
        status, out, err = train("config.py", "--warmup_iters=50", *args, "--out_dir=out/a")
        assert status == 0, err
        assert "the warm-up of 50 steps is no shorter than the run of" in out and "the whole" in out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "shape", [dict(n_layer=3, n_embd=64, n_head=4), dict(n_layer=6, n_embd=32, n_head=2, n_inner=96)]
)
def test_the_expected_memory_is_what_a_backward_pass_keeps(shape, recompute):
    """What autograd saves of the blocks, each storage once."""
    s = train_py.Settings(batch_size=4, block_size=32, recompute=recompute)
    config = GPTConfig(block_size=32, vocab_size=64, **shape)
    model, rt, kept = GPT(config), runtime.choose("cpu"), {}
    model.recompute = recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(4, 32, dtype=torch.long))
    without = train_py.Settings(batch_size=0, block_size=32, recompute=recompute)
    of_batch = runtime.expected_memory(config, s, rt) - runtime.expected_memory(config, without, rt)
    block = 4 * (9 * config.n_embd + 2 * (config.n_inner or 4 * config.n_embd)) * 4 * 32
    # A block that is computed again keeps nothing but its input, until its own backward pass.
    found = sum(kept.values()) + (block if recompute else 0)
    logits = 4 * 32 * 64 * 4  # They come after the hidden states.
    assert hidden.shape == (4, 32, config.n_embd) and abs((of_batch - logits) / found - 1) < 0.12


@pytest.mark.parametrize(
    ("batch", "recompute", "advice"),
    [
        (6, False, "--batch_size=3 --gradient_accumulation_steps=80 trains the same in less"),
        (7, False, "--batch_size=1 --gradient_accumulation_steps=280 trains the same in less"),
        (1, False, "take --recompute=True, or a smaller block_size or model"),
        (1, True, "take a smaller block_size or model"),
    ],
)
def test_the_smaller_batch_that_trains_the_same(batch, recompute, advice):
    says = ahead.smaller_batch(settings_of(batch_size=batch, recompute=recompute))
    assert says.startswith(f" with batch_size={batch}; ") and says.endswith(advice)


def test_the_smaller_batch_is_not_split_anew():
    says = ahead.smaller_batch(settings_of(batch_size=6, auto_batch_size=True))
    assert "--batch_size=3 --gradient_accumulation_steps=80 --auto_batch_size=False trains the same" in says
