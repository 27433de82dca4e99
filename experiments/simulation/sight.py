"""The images of a scenario's clients; those of one architecture share a model, which knows all of them."""

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import read_examples
from fedmosaic.client.vision.inputs import VisionInputs, open_images
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient


def give_client_sight(
    scenario: Scenario, client: ScenarioClient, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Let a client's model read the images of all the scenario's examples; errors as of `open_images`.

    Args:
        scenario: paths resolved.
        client: the first of those that use the model.
        model: adapted; its input embedding is changed.
        tokenizer: of the model.

    Returns:
        A tokenizer that knows the images; the one given if the scenario has none.
    """
    inputs = VisionInputs(client.model.path, scenario.pictures, client.projector, scenario.question_only)
    tasks = [task for entry in (*scenario.clients, *scenario.unseen) for task in entry.task_list]
    files = [file for task in tasks for file in (task.train, task.test)]
    examples = [example for file in files for example in read_examples(file)]
    return open_images(inputs, model, tokenizer, examples, scenario.training.max_length)
