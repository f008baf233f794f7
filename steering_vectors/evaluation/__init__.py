"""Find out whether a vector steers: propensities with controls and intervals, and what steering costs.

Everything here calls the library's public functions only.
"""

from steering_vectors.evaluation.answers import AnswerRow
from steering_vectors.evaluation.calibrating import Calibration, calibrate
from steering_vectors.evaluation.controls import Controls
from steering_vectors.evaluation.diagnosing import Diagnosis, LayerDiagnosis, diagnose
from steering_vectors.evaluation.evaluating import evaluate
from steering_vectors.evaluation.items import EvaluationItem
from steering_vectors.evaluation.propensity import Propensity, choice_propensity, text_propensity
from steering_vectors.evaluation.result import Evaluation, verdict
from steering_vectors.evaluation.rows import ConditionRow, ItemRow
from steering_vectors.evaluation.sweep_result import PointRow, Sweep, SweepRow
from steering_vectors.evaluation.sweeping import sweep
from steering_vectors.monitoring import monitor

__all__ = [
    "AnswerRow",
    "Calibration",
    "ConditionRow",
    "Controls",
    "Diagnosis",
    "Evaluation",
    "EvaluationItem",
    "ItemRow",
    "LayerDiagnosis",
    "PointRow",
    "Propensity",
    "Sweep",
    "SweepRow",
    "calibrate",
    "choice_propensity",
    "diagnose",
    "evaluate",
    "monitor",
    "sweep",
    "text_propensity",
    "verdict",
]
