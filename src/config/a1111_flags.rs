//! The table of A1111 1.10's and Forge's command-line flags: how many words each takes and what it does here.
//!
//! From the API contract, chapter 18. Names are without the leading dashes.

use super::layers::Kind;

/// How many words follow a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arity {
    None,
    One,
    Many,
}

/// What a flag does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// Its value becomes a setting.
    Set(&'static str, Kind),
    /// It turns a setting on (`true`) or off.
    Switch(&'static str, bool),
    /// It sets a text.
    Fixed(&'static str, &'static str),
    /// `--data-dir`.
    DataDir,
    /// A file of `user:password` pairs.
    PairsFile,
    /// `--device-id N`.
    DeviceId,
    /// `--use-cpu all`.
    UseCpu,
    /// `--precision full`.
    Precision,
    /// Nothing to do, nothing to say.
    Silent,
    /// Nothing to do; the user should know.
    Ignored(&'static str),
    /// Must not be ignored.
    Refuse(&'static str),
}

pub(super) type Row = (&'static str, Arity, Act);

const NO_EFFECT: Act = Act::Ignored("has no effect in sdgen");
const OFFLOADING: Act = Act::Ignored("has no effect: sdgen keeps the whole model on its device");
const TLS: Act = Act::Refuse(
    "TLS is not served by `sdgen serve`; put a TLS proxy before it and remove the flag",
);

#[rustfmt::skip]
pub(super) const FLAGS: &[Row] = &[
    ("port", Arity::One, Act::Set("server.port", Kind::Int)),
    ("listen", Arity::None, Act::Fixed("server.host", "0.0.0.0")),
    ("server-name", Arity::One, Act::Set("server.host", Kind::Text)),
    ("api", Arity::None, Act::Silent),
    ("nowebui", Arity::None, Act::Switch("server.root_page", false)),
    ("api-auth", Arity::One, Act::Set("server.api_auth", Kind::List)),
    ("gradio-auth", Arity::One, Act::Set("server.api_auth", Kind::List)),
    ("api-auth-file", Arity::One, Act::PairsFile),
    ("gradio-auth-path", Arity::One, Act::PairsFile),
    ("api-log", Arity::None, Act::Switch("server.access_log", true)),
    ("api-server-stop", Arity::None, Act::Switch("server.server_stop", true)),
    ("add-stop-route", Arity::None, Act::Silent),
    ("cors-allow-origins", Arity::One, Act::Set("server.cors_allow_origins", Kind::List)),
    ("cors-allow-origins-regex", Arity::One, Act::Set("server.cors_allow_origins_regex", Kind::Text)),
    ("subpath", Arity::One, Act::Set("server.subpath", Kind::Text)),
    ("tls-keyfile", Arity::One, TLS),
    ("tls-certfile", Arity::One, TLS),
    ("disable-tls-verify", Arity::None, Act::Silent),
    ("timeout-keep-alive", Arity::One, Act::Silent),
    ("data-dir", Arity::One, Act::DataDir),
    ("forge-ref-a1111-home", Arity::One, Act::DataDir),
    ("models-dir", Arity::One, Act::Set("paths.models_dir", Kind::Text)),
    ("ckpt", Arity::One, Act::Set("model.checkpoint", Kind::Text)),
    ("ckpt-dir", Arity::One, Act::Set("paths.checkpoint_dirs", Kind::Append)),
    ("vae-dir", Arity::One, Act::Set("paths.vae_dirs", Kind::Append)),
    ("vae-path", Arity::One, Act::Set("model.vae", Kind::Text)),
    ("lora-dir", Arity::One, Act::Set("paths.lora_dirs", Kind::Append)),
    ("lyco-dir-backcompat", Arity::One, Act::Set("paths.lora_dirs", Kind::Append)),
    ("embeddings-dir", Arity::One, Act::Set("paths.embeddings_dir", Kind::Text)),
    ("esrgan-models-path", Arity::One, Act::Set("paths.esrgan_dirs", Kind::Append)),
    ("realesrgan-models-path", Arity::One, Act::Set("paths.esrgan_dirs", Kind::Append)),
    ("bsrgan-models-path", Arity::One, NO_EFFECT),
    ("dat-models-path", Arity::One, NO_EFFECT),
    ("swinir-models-path", Arity::One, NO_EFFECT),
    ("scunet-models-path", Arity::One, NO_EFFECT),
    ("ldsr-models-path", Arity::One, NO_EFFECT),
    ("gfpgan-models-path", Arity::One, Act::Silent),
    ("codeformer-models-path", Arity::One, Act::Silent),
    ("gfpgan-dir", Arity::One, Act::Silent),
    ("gfpgan-model", Arity::One, Act::Silent),
    ("unload-gfpgan", Arity::None, Act::Silent),
    ("hypernetwork-dir", Arity::One, Act::Silent),
    ("localizations-dir", Arity::One, Act::Silent),
    ("textual-inversion-templates-dir", Arity::One, Act::Silent),
    ("controlnet-dir", Arity::One, Act::Set("paths.controlnet_dir", Kind::Text)),
    ("controlnet-annotator-models-path", Arity::One, Act::Silent),
    ("controlnet-preprocessor-models-dir", Arity::One, Act::Silent),
    ("styles-file", Arity::One, Act::Set("paths.styles_files", Kind::Append)),
    ("ui-settings-file", Arity::One, Act::Set("paths.settings_file", Kind::Text)),
    ("ui-config-file", Arity::One, Act::Silent),
    ("freeze-settings", Arity::None, Act::Switch("server.freeze_settings", true)),
    ("freeze-settings-in-sections", Arity::One, Act::Switch("server.freeze_settings", true)),
    ("freeze-specific-settings", Arity::One, Act::Switch("server.freeze_settings", true)),
    ("no-half", Arity::None, Act::Fixed("device.dtype", "f32")),
    ("no-half-vae", Arity::None, Act::Silent),
    ("precision", Arity::One, Act::Precision),
    ("upcast-sampling", Arity::None, NO_EFFECT),
    ("medvram", Arity::None, OFFLOADING),
    ("medvram-sdxl", Arity::None, OFFLOADING),
    ("lowvram", Arity::None, OFFLOADING),
    ("lowram", Arity::None, Act::Silent),
    ("use-cpu", Arity::Many, Act::UseCpu),
    ("device-id", Arity::One, Act::DeviceId),
    ("xformers", Arity::None, Act::Silent),
    ("force-enable-xformers", Arity::None, Act::Silent),
    ("xformers-flash-attention", Arity::None, Act::Silent),
    ("opt-sdp-attention", Arity::None, Act::Silent),
    ("opt-sdp-no-mem-attention", Arity::None, Act::Silent),
    ("opt-split-attention", Arity::None, Act::Silent),
    ("opt-split-attention-v1", Arity::None, Act::Silent),
    ("opt-split-attention-invokeai", Arity::None, Act::Silent),
    ("opt-sub-quad-attention", Arity::None, Act::Silent),
    ("sub-quad-q-chunk-size", Arity::One, Act::Silent),
    ("sub-quad-kv-chunk-size", Arity::One, Act::Silent),
    ("sub-quad-chunk-threshold", Arity::One, Act::Silent),
    ("opt-channelslast", Arity::None, Act::Silent),
    ("disable-opt-split-attention", Arity::None, Act::Silent),
    ("disable-nan-check", Arity::None, NO_EFFECT),
    ("no-hashing", Arity::None, Act::Switch("model.hashing", false)),
    ("skip-load-model-at-start", Arity::None, Act::Switch("model.load_at_start", false)),
    ("ui-debug-mode", Arity::None, Act::Switch("model.load_at_start", false)),
    ("disable-safe-unpickle", Arity::None, NO_EFFECT),
    ("no-download-sd-model", Arity::None, Act::Silent),
    ("do-not-download-clip", Arity::None, Act::Silent),
    ("filenames-max-length", Arity::One, Act::Silent),
    ("unix-filenames-sanitization", Arity::None, Act::Silent),
    ("no-prompt-history", Arity::None, Act::Silent),
    ("hide-ui-dir-config", Arity::None, Act::Silent),
    ("loglevel", Arity::One, Act::Set("log.level", Kind::Text)),
    ("log-startup", Arity::None, Act::Silent),
    ("dump-sysinfo", Arity::None, Act::Silent),
    ("skip-torch-cuda-test", Arity::None, Act::Silent),
    ("skip-version-check", Arity::None, Act::Silent),
    ("skip-python-version-check", Arity::None, Act::Silent),
    ("skip-prepare-environment", Arity::None, Act::Silent),
    ("skip-install", Arity::None, Act::Silent),
    ("reinstall-xformers", Arity::None, Act::Silent),
    ("reinstall-torch", Arity::None, Act::Silent),
    ("update-check", Arity::None, Act::Silent),
    ("update-all-extensions", Arity::None, Act::Silent),
    ("exit", Arity::None, Act::Silent),
    ("test-server", Arity::None, Act::Silent),
    ("enable-insecure-extension-access", Arity::None, Act::Silent),
    ("disable-all-extensions", Arity::None, Act::Silent),
    ("disable-extra-extensions", Arity::None, Act::Silent),
    ("allow-code", Arity::None, Act::Silent),
    ("administrator", Arity::None, Act::Silent),
    ("share", Arity::None, Act::Ignored("has no effect: sdgen opens no tunnel")),
    ("ngrok", Arity::One, Act::Ignored("has no effect: sdgen opens no tunnel")),
    ("ngrok-region", Arity::One, Act::Silent),
    ("ngrok-options", Arity::One, Act::Silent),
    ("autolaunch", Arity::None, Act::Silent),
    ("theme", Arity::One, Act::Silent),
    ("gradio-img2img-tool", Arity::One, Act::Silent),
    ("gradio-inpaint-tool", Arity::One, Act::Silent),
    ("gradio-allowed-path", Arity::One, Act::Silent),
    ("gradio-debug", Arity::None, Act::Silent),
    ("gradio-queue", Arity::None, Act::Silent),
    ("no-gradio-queue", Arity::None, Act::Silent),
    ("use-textbox-seed", Arity::None, Act::Silent),
    ("no-progressbar-hiding", Arity::None, Act::Silent),
    ("disable-console-progressbars", Arity::None, Act::Silent),
    ("max-batch-count", Arity::One, Act::Silent),
    ("use-ipex", Arity::None, NO_EFFECT),
    ("use-directml", Arity::None, NO_EFFECT),
    ("use-zluda", Arity::None, NO_EFFECT),
    ("always-batch-cond-uncond", Arity::None, Act::Silent),
    ("deepdanbooru", Arity::None, Act::Silent),
    ("enable-console-prompts", Arity::None, Act::Silent),
    ("show-negative-prompt", Arity::None, Act::Silent),
    ("cuda-malloc", Arity::None, NO_EFFECT),
    ("cuda-stream", Arity::None, NO_EFFECT),
    ("pin-shared-memory", Arity::None, NO_EFFECT),
    ("always-gpu", Arity::None, NO_EFFECT),
    ("always-high-vram", Arity::None, NO_EFFECT),
    ("always-low-vram", Arity::None, OFFLOADING),
];
