from pathlib import Path

import pytest

from sae_core.circuits.tasks import SHIPPED, TaskError, load_task, load_tasks

GOOD = 'name = "mini"\ndescription = "x"\nprompts = [["A B", " C", " D"]]\n'


def test_the_shipped_tasks_have_prompts_enough_and_no_two_alike() -> None:
    tasks = load_tasks()
    assert {task.name for task in tasks} == {"agreement", "brackets", "capitals", "list_order", "professions"}
    for task in tasks:
        assert task.name == SHIPPED.joinpath(f"{task.name}.toml").stem
        assert len({prompt.text for prompt in task.prompts}) == len(task.prompts) >= 20
        assert all(prompt.target != prompt.against for prompt in task.prompts)
        assert all(prompt.text == prompt.text.strip() for prompt in task.prompts)  # spaces belong to the next token


def test_the_prompts_of_a_pair_ask_for_each_others_tokens() -> None:
    pairs = {task.name: task.pairs for task in load_tasks()}
    assert len(pairs["agreement"]) == 16
    assert pairs["professions"]
    assert pairs["brackets"] == []
    for one, other in (*pairs["agreement"], *pairs["professions"]):
        assert (one.target, one.against) == (other.against, other.target)


def test_a_folder_of_ones_own_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "mini.toml").write_text(GOOD, "utf-8")
    (task,) = load_tasks(tmp_path, ["mini"])
    assert (task.prompts[0].text, task.prompts[0].target, task.prompts[0].against) == ("A B", " C", " D")
    with pytest.raises(TaskError, match="no task 'other': known are mini"):
        load_tasks(tmp_path, ["other"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = ", "is not a TOML file"),
        (GOOD + "extra = 1\n", "extra: unknown key"),
        (GOOD.replace('" D"', "3"), "prompts.0.2"),
        (GOOD.replace('[["A B", " C", " D"]]', "[]"), "prompts: "),
        (GOOD.replace("mini", "Mini Task"), "name: "),
        (GOOD + "paired = true\n", "1 prompts are no pairs"),
        (
            GOOD.replace('[["A B", " C", " D"]]', '[["A", " C", " D"], ["B", " C", " D"]]') + "paired = true\n",
            "'A' and 'B' are no pair",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "mini.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(TaskError, match=why) as refused:
        load_task(path)
    assert str(path) in str(refused.value)
    with pytest.raises(TaskError, match="holds no task"):
        load_tasks(tmp_path / "nowhere")
    with pytest.raises(TaskError, match="cannot read"):
        load_task(tmp_path / "nowhere.toml")
