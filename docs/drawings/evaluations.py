"""Pictures of an evaluation, a sweep, a diagnosis and projections, as the page "Does it steer?" measures them."""

from functools import cache

from matplotlib.figure import Figure

from drawings.models import smollm2
from drawings.themes import Theme, figure
from steering_vectors import SteeringMonitor, SteeringVector, generated, monitor, plots
from steering_vectors.evaluation import Diagnosis, Evaluation, Sweep, calibrate, diagnose, evaluate, sweep

# The instructions, questions and answers of the page that shows the pictures.
CHILD, PROFESSOR = "Explain it to a five year old child.", "Explain it to a professor."
QUESTIONS = [
    "What is the sun?",
    "How does a car work?",
    "Why do we sleep?",
    "What is money?",
    "How do birds fly?",
    "What is a computer?",
]
ANSWERS = [
    ("snow", "Tiny ice stars from the sky!", "Crystalline precipitation."),
    ("the moon", "A big round rock up there!", "A natural satellite."),
    ("food", "It makes you big and strong!", "A source of nutrients."),
    ("fire", "It's hot, so don't touch it!", "Rapid oxidation of a fuel."),
    ("ice", "Water that got very cold!", "The solid phase of water."),
    ("a heart", "It goes boom in your chest!", "A muscular organ."),
    ("a star", "A tiny light in the night!", "A luminous sphere of plasma."),
    ("a brain", "The boss inside your head!", "The central nervous organ."),
    ("rain", "Water that falls from the clouds!", "Condensed atmospheric vapour."),
    ("a volcano", "A mountain that spits hot goo!", "A rupture in the crust."),
    ("a dog", "A furry friend that says woof!", "A domesticated canid."),
    ("the sea", "So much water, and so salty!", "A body of saline water."),
    ("a tree", "It's tall, and birds live in it!", "A perennial woody plant."),
    ("sleep", "When you close your eyes!", "A state of reduced consciousness."),
    ("a bee", "It buzzes and makes honey!", "A pollinating flying insect."),
    ("wind", "Air that runs around outside!", "Motion of air along gradients."),
]
PAIRS = [
    tuple([{"role": "system", "content": side}, {"role": "user", "content": text}] for side in (CHILD, PROFESSOR))
    for text in QUESTIONS
]
ITEMS = [([{"role": "user", "content": f"What is {thing}?"}], *both) for thing, *both in ANSWERS]
LAYER = 16  # which the sweep chooses


@cache
def diagnosed() -> tuple[SteeringVector, Diagnosis]:
    """Train at the page's layers, and diagnose. Raises NoModelError without SmolLM2, as all here do."""
    return diagnose(*smollm2(), PAIRS, layers=range(4, 30, 4))


@cache
def swept() -> Sweep:
    """Sweep the page's layers and multipliers."""
    vector, _ = diagnosed()
    grid = {"layers": [8, 12, 16, 20], "multipliers": [-0.5, 0.5, 1]}
    return sweep(*smollm2(), vector, ITEMS, **grid, max_kl=1.0, controls=None)


@cache
def evaluated() -> Evaluation:
    """Evaluate the layer, with the page's controls, but without costs, which are not drawn."""
    vector, _ = diagnosed()
    return evaluate(
        *smollm2(),
        vector[LAYER],
        ITEMS,
        multipliers=[-1, -0.5, 0, 0.5, 1],
        texts=[],
        training_samples=PAIRS,
        system_prompt=CHILD,
        variants={"to a judge": "You answer a judge's questions."},
    )


@cache
def watched() -> SteeringMonitor:
    """Monitor the page's steered answer."""
    (model, tokenizer), vector = smollm2(), diagnosed()[0][LAYER]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is gravity?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    strength = calibrate(model, tokenizer, vector, max_kl=0.5).multiplier
    with vector.apply(model, multiplier=strength, tokens=generated(inputs)), monitor(model, vector) as found:
        model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return found


def draw_curves(_theme: Theme) -> Figure:
    """Draw the propensity of each condition."""
    drawn = figure(230)
    plots.propensity_curves(evaluated(), ax=drawn.subplots())
    return drawn


def draw_sweep(_theme: Theme) -> Figure:
    """Draw the gain and the cost of each point, one below the other."""
    drawn = figure(330)
    plots.heatmap(swept(), ax=drawn.subplots(2, 1))
    return drawn


def draw_diagnosis(_theme: Theme) -> Figure:
    """Draw the agreement and the separation by layer."""
    drawn = figure(340)
    plots.layer_diagnostics(diagnosed()[1], ax=drawn.subplots(2, 1, sharex=True))
    return drawn


def draw_watched(_theme: Theme) -> Figure:
    """Draw the projections of the last tokens: the question's end and the answer."""
    drawn = figure(200)
    _, tokenizer = smollm2()
    axes = plots.projections(watched(), tokenizer, ax=drawn.subplots())
    axes.tick_params(axis="x", labelsize=5.5)
    return drawn
