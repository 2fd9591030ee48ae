"""Known linear operators that take a source to a view."""

from dichroic.operators.base import Operator as Operator
from dichroic.operators.base import Shape as Shape
from dichroic.operators.conversion import as_operator as as_operator
from dichroic.operators.convolve import Convolve as Convolve
from dichroic.operators.elementary import Dense as Dense
from dichroic.operators.elementary import Diagonal as Diagonal
from dichroic.operators.elementary import FunctionOperator as FunctionOperator
from dichroic.operators.elementary import Identity as Identity
from dichroic.operators.elementary import Scale as Scale
from dichroic.operators.elementary import Zero as Zero
from dichroic.operators.external import External as External
from dichroic.operators.imaging import BlockAverage as BlockAverage
from dichroic.operators.imaging import BlockProject as BlockProject
from dichroic.operators.imaging import PatchPlacement as PatchPlacement
from dichroic.operators.learnable import Learnable as Learnable
from dichroic.operators.sparse import Sparse as Sparse
from dichroic.operators.structure import Compose as Compose
from dichroic.operators.structure import Stack as Stack
from dichroic.operators.structure import Sum as Sum
