# JupyterLab on the notebooks, the kernel ready: for Docker, for Binder (which takes this file) and for .devcontainer.
#   docker build -t qlora-nb .
#   docker run --rm -p 8888:8888 qlora-nb      # and open the address that it prints
# The build compiles about 400 crates: half an hour on two cores, and 8 GB of memory or more.
#
# This file was written and read with care, but no Docker daemon was at hand to build it. Its commands are those of
# scripts/setup, which the tests run on Debian. On Binder the build may take longer than its operators allow.
FROM rust:1.95-bookworm

RUN apt-get update \
    && apt-get install -qy --no-install-recommends python3-venv fonts-noto-cjk \
    && rm -rf /var/lib/apt/lists/*

# Binder names the user by these.
ARG NB_USER=reader
ARG NB_UID=1000
RUN useradd --create-home --uid "$NB_UID" "$NB_USER"
ENV HOME=/home/$NB_USER
COPY --chown=$NB_UID . $HOME/qlora-nb
USER $NB_USER
WORKDIR $HOME/qlora-nb

# What `install` laid out keeps its own copies of what a cell links to, so the build folder may go: the image is
# smaller by gigabytes. Binder starts `jupyter-notebook`, hence the package of that name.
RUN scripts/setup lab smollm2 \
    && "$HOME/.cache/qlora-nb/jupyter/bin/pip" install --quiet --no-cache-dir notebook \
    && "$HOME/.cache/qlora-nb/target/release/qlora-nb" doctor \
    && "$HOME/.cache/qlora-nb/jupyter/bin/jupyter" trust notebooks/*/*.ipynb \
    && rm -rf "$HOME/.cache/qlora-nb/target" /usr/local/cargo/registry

ENV PATH=$HOME/.cache/qlora-nb/jupyter/bin:$PATH
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks"]
