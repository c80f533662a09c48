//! The page, as it was when this program was built.

macro_rules! asset {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/admin/", $file))
    };
}

const FILES: [(&str, &str, &str); 7] = [
    ("/", "text/html; charset=utf-8", asset!("index.html")),
    ("/page.css", "text/css; charset=utf-8", asset!("page.css")),
    (
        "/page.mjs",
        "text/javascript; charset=utf-8",
        asset!("page.mjs"),
    ),
    (
        "/draw.mjs",
        "text/javascript; charset=utf-8",
        asset!("draw.mjs"),
    ),
    (
        "/service.mjs",
        "text/javascript; charset=utf-8",
        asset!("service.mjs"),
    ),
    (
        "/examples.mjs",
        "text/javascript; charset=utf-8",
        asset!("examples.mjs"),
    ),
    ("/icon.svg", "image/svg+xml", asset!("icon.svg")),
];

/// Type and text of a file of the page.
pub(super) fn find(path: &str) -> Option<(&'static str, &'static str)> {
    FILES
        .iter()
        .find(|(name, ..)| *name == path)
        .map(|(_, kind, text)| (*kind, *text))
}
