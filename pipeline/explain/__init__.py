"""Why a model answers as it does: GradCAT and CAM of NesT, attention roll-out, how alike tokens become with depth."""
