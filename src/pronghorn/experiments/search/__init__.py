"""A search for the settings of a run, on a base model that is loaded once."""

from pronghorn.experiments.search.bench import Metric as Metric
from pronghorn.experiments.search.bench import Task as Task
from pronghorn.experiments.search.bench import steps_of as steps_of
from pronghorn.experiments.search.search import SearchResult as SearchResult
from pronghorn.experiments.search.search import search as search
from pronghorn.experiments.search.space import ADAPTER_KEYS as ADAPTER_KEYS
from pronghorn.experiments.search.space import Range as Range
from pronghorn.experiments.search.space import Settings as Settings
from pronghorn.experiments.search.space import Space as Space
from pronghorn.experiments.search.trial import Trial as Trial
