//! What a new project begins with.

use std::path::Path;

use super::{
    Language, ProjectError, check_free, check_name,
    contract::{SDK, SDK_JS, files, write, write_as_dependency, write_contract},
};

const RUST: &[(&str, &str)] = files!("services/templates/rust":
    "Cargo.toml" ".cargo/config.toml" "src/lib.rs" "README.md"
);
const JAVASCRIPT: &[(&str, &str)] = files!("services/templates/js":
    "package.json" "service.js" "actions.js" "actions.test.js" "README.md"
);
const TYPESCRIPT: &[(&str, &str)] = files!("services/templates/ts":
    "package.json" "tsconfig.json" "service.ts" "actions.ts" "actions.test.ts" "README.md"
);
const PYTHON: &[(&str, &str)] = files!("services/templates/python":
    "pyproject.toml" "requirements.txt" "app.py" "actions.py" "mb_service.py" "test_actions.py"
    "README.md"
);
const EVERY: &[(&str, &str)] = files!("services/templates":
    "mb-server.toml" "gitignore"
);
const WORLD: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/services/templates/world.wit"
));

/// Where the SDKs find the contract in this repository, and in a project.
const SDK_CONTRACT: (&str, &str) = ("path: \"../../wit\"", "path: \"wit\"");
const SDK_JS_CONTRACT: (&str, &str) = ("path.join(SDK, '../../wit')", "path.join(SDK, 'wit')");

/// Makes a project. Nothing that is there is overwritten.
///
/// # Errors
/// The name is not available, the folder is there already, or a file can't be
/// written.
pub fn create(dir: &Path, name: &str, language: Language) -> Result<(), ProjectError> {
    check_name(name)?;
    check_free(dir)?;
    let files = match language {
        Language::Rust => RUST,
        Language::JavaScript => JAVASCRIPT,
        Language::TypeScript => TYPESCRIPT,
        Language::Python => PYTHON,
    };
    for (file, text) in files.iter().chain(EVERY) {
        let file = if *file == "gitignore" {
            ".gitignore"
        } else {
            file
        };
        write(&dir.join(file), &text.replace("{{name}}", name))?;
    }
    let (sdk, (before, after)) = match language {
        Language::Rust => (SDK, SDK_CONTRACT),
        Language::JavaScript | Language::TypeScript => (SDK_JS, SDK_JS_CONTRACT),
        Language::Python => {
            write(&dir.join("wit/world.wit"), WORLD)?;
            return write_as_dependency(&dir.join("wit"));
        }
    };
    for (file, text) in sdk {
        write(&dir.join("sdk").join(file), &text.replace(before, after))?;
    }
    write_contract(&dir.join("sdk/wit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sdks_name_their_contract_once() {
        for (sdk, (before, _)) in [(SDK, SDK_CONTRACT), (SDK_JS, SDK_JS_CONTRACT)] {
            let named: usize = sdk
                .iter()
                .map(|(_, text)| text.matches(before).count())
                .sum();
            assert_eq!(named, 1);
        }
        assert!(
            EVERY
                .iter()
                .any(|(file, _)| *file == super::super::SETTINGS)
        );
    }
}
