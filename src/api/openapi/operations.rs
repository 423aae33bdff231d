//! What every route is for: one row for each path and method, in the order of the document.
//!
//! A row without a route, or a route without a row, fails the tests of this room.

/// One method of one path.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// In small letters.
    pub method: &'static str,
    /// As the routes spell it.
    pub path: &'static str,
    /// Group in the document.
    pub tag: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// What is sent.
    pub body: Body,
    /// What is answered.
    pub answer: Answer,
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    None,
    /// JSON of this schema.
    Json(&'static str),
    /// A form of this schema.
    Form(&'static str),
}

/// What is answered with success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// JSON of a kind in the notation of the schemas.
    Kind(&'static str),
    /// An object in the notation.
    Object(&'static str),
    /// A list of objects in the notation.
    List(&'static str),
    /// A named schema.
    Named(&'static str),
    /// A named schema, 202 for what is accepted and 200 for what was there.
    Accepted(&'static str),
    /// JSON `null`.
    Null,
    /// Bytes of one of these types.
    Bytes(&'static [&'static str]),
}

/// Parameters of queries: path, name, kind, meaning.
pub const QUERIES: &[(&str, &str, &str, &str)] = &[
    (
        "/sdapi/v1/progress",
        "skip_current_image",
        "b",
        "leave the preview out",
    ),
    (
        "/v1/jobs",
        "state",
        "s",
        "`queued`, `running`, `done`, `failed` or `cancelled`",
    ),
    ("/v1/jobs", "client", "s", "only this client's"),
    (
        "/v1/jobs",
        "search",
        "s",
        "only those whose prompt contains this",
    ),
    ("/v1/jobs", "before", "s", "last id of the page before"),
    ("/v1/jobs", "limit", "i", "1 to 500"),
    (
        "/v1/jobs/{id}/events",
        "previews",
        "s",
        "`1`: previews as well",
    ),
];

/// Parts of the site that are no API: pages and this document.
pub const HIDDEN: &[&str] = &["/", "/docs", "/docs/{name}", "/redoc", "/openapi.json"];

const NONE: Body = Body::None;
const MADE: Answer = Answer::Object("images:[s] parameters:o info:s");
const PICTURES: &[&str] = &["image/png", "image/jpeg", "image/webp"];
const IMAGES: Answer = Answer::Object("created:i data:[o] background:s output_format:s size:s");

const fn get(
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    answer: Answer,
) -> Operation {
    Operation {
        method: "get",
        path,
        tag,
        summary,
        body: NONE,
        answer,
    }
}

const fn post(
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    body: Body,
    answer: Answer,
) -> Operation {
    Operation {
        method: "post",
        path,
        tag,
        summary,
        body,
        answer,
    }
}

const EMPTY: Answer = Answer::Object("");

#[rustfmt::skip]
/// Every operation.
pub const OPERATIONS: &[Operation] = &[
    post("/sdapi/v1/txt2img", "generation", "Makes pictures from a prompt.", Body::Json("Txt2Img"), MADE),
    post("/sdapi/v1/img2img", "generation", "Makes pictures from pictures.", Body::Json("Img2Img"), MADE),
    post("/sdapi/v1/extra-single-image", "generation", "Enlarges a picture.", Body::Json("ExtrasSingle"), Answer::Object("html_info:s image:s")),
    post("/sdapi/v1/extra-batch-images", "generation", "Enlarges several pictures alike.", Body::Json("ExtrasBatch"), Answer::Object("html_info:s images:[s]")),
    post("/sdapi/v1/png-info", "generation", "Reads how a picture was made.", Body::Json("PngInfo"), Answer::Object("info:s items:o parameters:o")),
    get("/sdapi/v1/progress", "progress", "Progress of the running job; zeros when idle.", Answer::Object("progress:n eta_relative:n state:o current_image:s? textinfo:s?")),
    post("/sdapi/v1/interrupt", "progress", "Ends the running job at its next step.", NONE, EMPTY),
    post("/sdapi/v1/skip", "progress", "Ends the running job's present batch.", NONE, Answer::Null),
    post("/internal/progress", "progress", "Progress of one task.", Body::Json("TaskProgress"), Answer::Object("active:b queued:b completed:b progress:n? eta:n? live_preview:s? id_live_preview:i textinfo:s?")),
    get("/internal/pending-tasks", "progress", "Tasks that wait.", Answer::Object("size:i tasks:[s]")),
    get("/sdapi/v1/options", "options", "Every option.", Answer::Named("Options")),
    post("/sdapi/v1/options", "options", "Changes options, loading a checkpoint if it changes.", Body::Json("Options"), Answer::Null),
    get("/sdapi/v1/cmd-flags", "options", "Every flag of the command line.", EMPTY),
    get("/sdapi/v1/samplers", "lists", "Samplers.", Answer::List("name:s aliases:[s] options:o")),
    get("/sdapi/v1/schedulers", "lists", "Schedulers.", Answer::List("name:s label:s aliases:[s]? default_rho:n need_inner_model:b")),
    get("/sdapi/v1/upscalers", "lists", "Upscalers.", Answer::List("name:s model_name:s? model_path:s? model_url:s? scale:n?")),
    get("/sdapi/v1/latent-upscale-modes", "lists", "Upscalers of latents.", Answer::List("name:s")),
    get("/sdapi/v1/sd-models", "lists", "Checkpoints.", Answer::List("title:s model_name:s hash:s? sha256:s? filename:s config:s?")),
    get("/sdapi/v1/sd-vae", "lists", "VAEs.", Answer::List("model_name:s filename:s")),
    get("/sdapi/v1/loras", "lists", "LoRAs.", Answer::List("name:s alias:s path:s metadata:o")),
    get("/sdapi/v1/embeddings", "lists", "Textual inversions.", Answer::Object("loaded:o skipped:o")),
    get("/sdapi/v1/prompt-styles", "lists", "Styles.", Answer::List("name:s prompt:s? negative_prompt:s?")),
    get("/sdapi/v1/scripts", "lists", "Scripts by page.", Answer::Object("txt2img:[s] img2img:[s]")),
    get("/sdapi/v1/script-info", "lists", "Scripts with their arguments.", Answer::Kind("[o]")),
    get("/sdapi/v1/extensions", "lists", "Extensions.", Answer::Kind("[o]")),
    get("/sdapi/v1/hypernetworks", "lists", "Hypernetworks.", Answer::Kind("[o]")),
    get("/sdapi/v1/face-restorers", "lists", "Restorers of faces.", Answer::Kind("[o]")),
    get("/sdapi/v1/realesrgan-models", "lists", "Upscalers of Real-ESRGAN.", Answer::List("name:s path:s? scale:n?")),
    post("/sdapi/v1/refresh-checkpoints", "models", "Looks for checkpoints again.", NONE, Answer::Null),
    post("/sdapi/v1/refresh-vae", "models", "Looks for VAEs again.", NONE, Answer::Null),
    post("/sdapi/v1/refresh-loras", "models", "Looks for LoRAs again.", NONE, Answer::Null),
    post("/sdapi/v1/refresh-embeddings", "models", "Looks for textual inversions again.", NONE, Answer::Null),
    post("/sdapi/v1/unload-checkpoint", "models", "Drops the loaded checkpoint.", NONE, EMPTY),
    post("/sdapi/v1/reload-checkpoint", "models", "Loads the checkpoint of the options.", NONE, EMPTY),
    post("/sdapi/v1/interrogate", "absent", "Describes a picture: no model for it is there.", NONE, EMPTY),
    post("/sdapi/v1/create/embedding", "absent", "Always 501: nothing is trained here.", NONE, EMPTY),
    post("/sdapi/v1/create/hypernetwork", "absent", "Always 501: nothing is trained here.", NONE, EMPTY),
    post("/sdapi/v1/train/embedding", "absent", "Always 501: nothing is trained here.", NONE, EMPTY),
    post("/sdapi/v1/train/hypernetwork", "absent", "Always 501: nothing is trained here.", NONE, EMPTY),
    get("/internal/sysinfo", "page", "What the server runs on, credentials hidden.", Answer::Bytes(&["text/plain"])),
    get("/internal/sysinfo-download", "page", "The same as a file.", Answer::Bytes(&["text/plain"])),
    get("/internal/quicksettings-hint", "page", "Names of all options.", Answer::List("name:s label:s")),
    get("/internal/profile-startup", "page", "Seconds that the start took.", Answer::Object("total:n records:o")),
    get("/sd_extra_networks/thumb", "page", "The picture beside a model file.", Answer::Bytes(PICTURES)),
    get("/sd_extra_networks/metadata", "page", "A LoRA's metadata as text.", EMPTY),
    get("/sd_extra_networks/cover-images", "page", "Pictures within a model file.", Answer::Bytes(PICTURES)),
    get("/sd_extra_networks/get-single-card", "page", "A card of A1111's page.", EMPTY),
    get("/config", "page", "The choices that old clients look for in A1111's page.", EMPTY),
    post("/login", "page", "Whether credentials are right.", NONE, EMPTY),
    get("/login_check", "page", "Whether credentials are right.", Answer::Null),
    get("/controlnet/version", "ControlNet", "Version of the extension's API.", Answer::Object("version:i")),
    get("/controlnet/model_list", "ControlNet", "Models: none.", Answer::Object("model_list:[s]")),
    get("/controlnet/module_list", "ControlNet", "Preprocessors: the one that changes nothing.", Answer::Object("module_list:[s] module_detail:o")),
    get("/controlnet/control_types", "ControlNet", "Models and preprocessors by type.", Answer::Object("control_types:o")),
    get("/controlnet/settings", "ControlNet", "Units of a request.", Answer::Object("control_net_unit_count:i")),
    post("/controlnet/detect", "ControlNet", "Gives pictures back by the preprocessor `none`.", NONE, Answer::Object("images:[s] info:s")),
    post("/v1/jobs", "jobs", "Submits a job that outlives its request.", Body::Json("JobSubmission"), Answer::Accepted("Job")),
    get("/v1/jobs", "jobs", "Jobs, newest first.", Answer::Object("jobs:[o] counts:o")),
    get("/v1/jobs/{id}", "jobs", "A job.", Answer::Named("Job")),
    Operation { method: "delete", ..get("/v1/jobs/{id}", "jobs", "Forgets an ended job and its files.", Answer::Object("id:s forgotten:b")) },
    post("/v1/jobs/{id}/cancel", "jobs", "Takes a queued job back, interrupts a running one.", NONE, Answer::Named("Job")),
    get("/v1/jobs/{id}/events", "jobs", "A job's life as server-sent events.", Answer::Bytes(&["text/event-stream"])),
    get("/v1/jobs/{id}/result", "jobs", "A job's pictures as base64.", Answer::Object("id:s images:[s] info:o")),
    get("/v1/jobs/{id}/images/{number}", "jobs", "One picture of a job.", Answer::Bytes(PICTURES)),
    get("/v1/events", "jobs", "The queue as server-sent events.", Answer::Bytes(&["text/event-stream"])),
    post("/v1/images/generations", "OpenAI", "Makes pictures from a prompt.", Body::Json("ImageGeneration"), IMAGES),
    post("/v1/images/edits", "OpenAI", "Paints a picture anew where it or its mask is transparent.", Body::Form("ImageEdit"), IMAGES),
    post("/v1/images/variations", "OpenAI", "Makes pictures like a picture.", Body::Form("ImageVariation"), IMAGES),
    get("/v1/images/files/{name}", "OpenAI", "A picture that was answered as an address, for an hour.", Answer::Bytes(PICTURES)),
    get("/v1/models", "OpenAI", "Checkpoints.", Answer::Object("object:s data:[o]")),
    get("/v1/models/{id}", "OpenAI", "A checkpoint.", Answer::Named("Model")),
    get("/metrics", "server", "Prometheus metrics.", Answer::Bytes(&["text/plain"])),
    get("/healthz", "server", "Whether the process answers.", Answer::Object("status:s")),
    get("/readyz", "server", "Whether a picture could be made; 503 with the reason if not.", Answer::Object("status:s")),
    get("/internal/ping", "server", "Whether the process answers.", EMPTY),
    get("/sdapi/v1/memory", "server", "Memory of host and device.", Answer::Object("ram:o cuda:o")),
    post("/sdapi/v1/server-stop", "server", "Ends the server.", NONE, Answer::Bytes(&["text/plain"])),
    post("/sdapi/v1/server-kill", "server", "Kills the process.", NONE, EMPTY),
    post("/sdapi/v1/server-restart", "server", "Always 501: a supervisor's business.", NONE, EMPTY),
];
