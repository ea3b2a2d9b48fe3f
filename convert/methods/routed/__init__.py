"""Routed heads on attention that is converted already: decoupled heads (DHA) and latents (MLA).

A checkpoint ships `modeling_moh_<method>.py` beside the files of both methods. Here those lie in their methods'
folders, and files of the same names lend them: `checkpoint.provenance` ships what they lend.
"""
