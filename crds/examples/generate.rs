//! Writes the files that are generated from the types of this crate. Run from anywhere in the repository.

use std::path::Path;

use plimsoll_crds::generated;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crds lies in the repository");
    for file in generated::files() {
        let path = root.join(&file.path);
        std::fs::create_dir_all(path.parent().expect("every file lies in a folder"))?;
        std::fs::write(&path, file.contents)?;
        println!("{}", file.path);
    }
    Ok(())
}
