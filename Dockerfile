# sdgen with its CPU backend. An image with CUDA is not there yet.
#
#   docker build -t sdgen .
#   docker run --rm -p 17860:17860 -v "$PWD/sdgen-data:/data" sdgen
#
# Another crate registry or a proxy comes from cargo's own settings: mount a configuration as the build secret `cargo-config`,
# `--secret id=cargo-config,src=config.toml`, or vendor the crates and name the directory in `.cargo/config.toml`.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=secret,id=cargo-config,target=/usr/local/cargo/config.toml,required=false \
    --mount=type=cache,target=/usr/local/cargo/registry \
    cargo build --release --locked --bin sdgen && cp target/release/sdgen /sdgen

FROM debian:bookworm-slim
# For `sdgen models pull` and the licence of what is inside the binary.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY LICENSE-MIT LICENSE-APACHE models/demo/ATTRIBUTION.md /usr/share/doc/sdgen/
COPY models/demo/licences /usr/share/doc/sdgen/licences
COPY --from=build /sdgen /usr/local/bin/sdgen
RUN useradd --system --uid 1000 --home-dir /data sdgen && install -d -o sdgen /data
USER sdgen
ENV SDGEN_DATA_DIR=/data SDGEN_HOST=0.0.0.0 SDGEN_LOG_FORMAT=json
VOLUME /data
EXPOSE 17860
# The running job gets `server.shutdown_grace_s` seconds; give `docker stop` more than its default of 10.
STOPSIGNAL SIGTERM
ENTRYPOINT ["sdgen"]
CMD ["serve"]
