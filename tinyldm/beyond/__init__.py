"""What came after the paper, and the parts of it that its own files do without.

Each file here is one change of one part, to be read beside the part that it changes. The
core does not know them: what is a row of a table is added to the table here, and all that
runs over the table, flags and tests above all, has it.
"""
from tinyldm.beyond import classifier, control, dit, flow, heun, zero_snr
from tinyldm.diffusion import DRAWS, PREDICTIONS, SCHEDULES
from tinyldm.samplers import SAMPLERS, TIMESTEPS
from tinyldm.tasks import TASKS
from tinyldm.unet import BACKBONES, Backbone, UNetConfig

SCHEDULES["straight"] = flow.STRAIGHT
SCHEDULES["zero-snr"] = zero_snr.ZERO_SNR
PREDICTIONS["flow"] = flow.VELOCITY
DRAWS["logit-normal"] = flow.draw_logit_normal
SAMPLERS["heun"] = heun.HEUN
SAMPLERS["flow-heun"] = heun.FLOW_HEUN
TIMESTEPS["karras"] = heun.karras_timesteps
TASKS["text-edges"] = control.TextEdges
BACKBONES["dit"] = Backbone("DiT", dit.DiTConfig, dit.DiT)
BACKBONES["control"] = Backbone(
    "U-Net with ControlNet", UNetConfig, control.ControlNet, concatenates=False
)
BACKBONES["classifier"] = Backbone(
    "classifier", UNetConfig, classifier.Classifier, is_eps_theta=False
)
