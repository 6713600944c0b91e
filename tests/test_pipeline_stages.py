"""What each stage trains on, what it saves, and who plays for whom."""

import types

import gymnasium
import numpy as np
import pytest
import torch
from test_pipeline import recording
from test_pipeline_world_model import CPU, toy_batch, toy_model

import tools
from hidreamer import checkpoint, evaluation
from hidreamer.dynamics.base import start_steps
from hidreamer.returns import ReturnNorm
from pipeline import collect, encoder, policy, tokenizer, world_model
from pipeline.token_agent import TokenAgent


def settings(**keys):
    return tools.load_config(["pipeline_debug"], keys)


def test_no_stage_trains_on_a_held_out_row(acting):
    """What ``Windows`` and ``Recording.rows`` can is asked for by every stage."""
    model = world_model.WorldModel(settings(), acting, CPU, print)
    acted = policy.Policy(settings(), acting, CPU, print)
    tokens = [tokenizer.load_tokens(acting, part) for part in model.recordings]
    kept = [index[~part.held] for part, index in zip(model.recordings, tokens, strict=True)]
    for windows, parts in ((model.windows, kept), (acted.windows, kept[:1])):
        for stream, part in zip(windows.replay.streams, parts, strict=True):
            assert np.array_equal(stream.slice(0, len(stream))["index"], part)
    coded = tokenizer.Tokenizer(settings(), acting, CPU, print)
    embed = [encoder.load_embeddings(acting, part.game)[~part.held] for part in model.recordings]
    assert np.array_equal(coded.embed.numpy(), np.concatenate(embed))


def test_the_config_s_mask_is_saved_and_every_mask_is_another(modelled):
    folder = modelled / "world_model"
    body = checkpoint.load_checkpoint(folder / "checkpoints" / "latest.pt")["body"]
    saved = checkpoint.load_checkpoint(folder / "world_model.pt")["params"]
    same = lambda params: all(torch.equal(x, saved[key]) for key, x in params.items())
    assert [same(params) for params in body["params"]] == [True, False, False]
    stage = world_model.WorldModel(settings(), modelled, CPU, print)
    stage._begin(1)
    stage._begin(2)
    masks = [model.dynamics.level_mask for model in stage.models]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_real_games_are_whole_sampled_and_others_for_everyone(acting, monkeypatch, tmp_path):
    stage, made, asked = policy.Policy(settings(), acting, CPU, print), [], []
    monkeypatch.setattr(policy, "make_env", lambda *args, **keys: made.append((args, keys)))

    class Envs:
        def __init__(self, make, count, parallel):
            make(0, 0)

        def close(self):
            pass

    def play(agent, envs, episodes, mode, **keys):
        asked.append((agent, mode, keys["limit"]))
        return evaluation.Played([], {}, None)

    monkeypatch.setattr(policy, "Envs", Envs)
    monkeypatch.setattr(policy.evaluation, "play", play)
    monkeypatch.setattr(policy.evaluation, "time_limit", lambda config: 4321)
    stage.folder = tmp_path
    run = types.SimpleNamespace(step=1, agent="theirs", finish=lambda: None, close=lambda: None)
    run.config = types.SimpleNamespace(steps=1)
    monkeypatch.setattr(policy, "Run", lambda *args: run)
    stage._evaluate("ours", policy.EVALUATION)
    stage._evaluate("chance", policy.RANDOM)
    stage._online()
    assert asked == [(who, "train", 4321) for who in ("ours", "chance", "theirs")]
    assert all(keys["evaluation"] for _, keys in made)
    assert [args[1]["time_limit"] for args, _ in made] == [4321] * 3
    assert len({args[2] for args, _ in made}) == 3


def test_ppo_makes_as_many_passes_and_its_range_moves_as_far():
    config, model, _ = toy_model()
    changes = {"pipeline.policy.algorithm": "ppo", "pipeline.policy.epochs": 3}
    changed = tools.load_config([], config.flat() | changes)
    agent = TokenAgent(model.eval(), gymnasium.spaces.Discrete(2), changed)
    agent.make_optimizers()
    assert agent.behavior.norm.rate == pytest.approx(ReturnNorm().rate / 3)
    steps, step = [], agent.step
    agent.step = lambda name, loss: steps.append(name) or step(name, loss)
    agent.update(agent.tensors(toy_batch(np.random.default_rng(0), 4)))
    assert steps == ["actor", "critic"] * 3


def test_dreams_begin_with_the_ends_of_their_own_steps():
    config, model, _ = toy_model()
    agent = TokenAgent(model.eval(), gymnasium.spaces.Discrete(2), config)
    agent.make_optimizers()
    batch = toy_batch(np.random.default_rng(0), 4)
    batch["is_terminal"] = np.random.default_rng(1).random((4, 8)) < 0.5
    told, imagine = [], agent.behavior.imagine
    agent.behavior.imagine = lambda *args: told.append(args[2]) or imagine(*args)
    agent.update(agent.tensors(batch))
    expected = batch["is_terminal"][:, start_steps(8, config.imag.starts)].ravel()
    assert told[0].tolist() == expected.tolist() and 0 < expected.sum() < len(expected)


def test_an_agent_s_play_is_sampled_and_random_as_often_as_asked():
    space = gymnasium.spaces.Discrete(3)
    given, config = [], settings(**{"pipeline.collect.random": 0.2})
    play = lambda obs, other: given.append(other is not None)  # other: a random action instead
    fake = types.SimpleNamespace(config=config)
    fake.policy = types.SimpleNamespace(episode=lambda seed: play)
    env, rng = types.SimpleNamespace(act_space=space), np.random.default_rng(0)
    choose = collect.Collect._chooser(fake, env, rng, 0)
    for _ in range(500):
        choose({})
    assert np.mean(given) == pytest.approx(0.2, abs=0.06)
    modes, one = [], collect.RecordedPolicy.__new__(collect.RecordedPolicy)

    class State(tuple):
        action = torch.zeros(1, 3)

    world = types.SimpleNamespace(encoder=types.SimpleNamespace(observed=()))
    one.agent = types.SimpleNamespace(
        initial=lambda count: State(),
        world_model=world,
        tensors=lambda x: x,
        act=lambda state, obs, mode: modes.append(mode) or state,
    )
    one.episode(0)({"is_first": True}, None)
    assert modes == ["train"]


def test_real_ends_survive_a_minari_data_set_and_a_cut_is_an_end(tmp_path):
    pytest.importorskip("minari")
    from pipeline import data, minari

    part = recording([4, 3, 5])  # each ends by itself
    part.image, part.is_terminal = part.image.astype(np.uint8), part.is_last & (part.episode != 1)
    minari.write(tmp_path, ["pong"], lambda game: part)
    spec = {"image": ((2, 2, 1), np.dtype(np.uint8))}
    space = data.Space("atari_pong", spec, 3)
    (found,) = minari.read(str(tmp_path), [space], 8)  # 3, 2, and 3 of 4 steps
    for key in ("is_last", "is_terminal"):
        ends = [played.rows[key].nonzero()[0].tolist() for played in found]
        assert ends == ([[3], [2], [3]] if key == "is_last" else [[3], [], []])
